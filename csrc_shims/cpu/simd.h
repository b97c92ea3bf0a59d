// The vector layer: W floats, their loads from and stores to every storage type, exp and tanh, reductions.
// Included by the kernels_*.cpp files only, each compiled for one ISA; everything has internal linkage, so that no
// function compiled for a wide ISA can be linked into the baseline path. GCC vector extensions do the arithmetic;
// intrinsics only where the compiler does not find the instruction by itself.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "params.h"
#include "prefetch.h"

#define TP_INLINE inline __attribute__((always_inline))
// The loop bounds below are compile-time constants; unrolled, the arrays live in registers. Builds for sanitizers leave
// it out.
#if !defined(TP_UNROLL)
#define TP_UNROLL _Pragma("GCC unroll 24")
#endif

namespace torch_paged {
namespace {

#if defined(__AVX512F__)
constexpr int W = 16;        // floats in a vector
constexpr int kReduce = 16;  // vectors reduced at once
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int kReduce = 8;
#else
constexpr int W = 4;
constexpr int kReduce = 8;
#endif

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint16_t vu16 __attribute__((vector_size(2 * W)));
typedef uint8_t vu8 __attribute__((vector_size(W)));
typedef int8_t vi8 __attribute__((vector_size(W)));

constexpr float kNegInf = -__builtin_inff();

TP_INLINE vf set1(float x) { return vf{} + x; }
TP_INLINE vi lane_index() {
  vi r;
  for (int i = 0; i < W; ++i) r[i] = i;
  return r;
}

template <class V>
TP_INLINE V load_bits(const void* p) {
  V v;
  __builtin_memcpy(&v, p, sizeof(V));
  return v;
}
TP_INLINE vf loadu(const float* p) { return load_bits<vf>(p); }
TP_INLINE void storeu(float* p, vf x) { __builtin_memcpy(p, &x, sizeof(x)); }

TP_INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }
TP_INLINE vf vabs(vf a) { return (vf)((vi)a & 0x7fffffff); }

// Lane i is a where bit i is set, else b.
TP_INLINE vf select_bits(uint32_t bits, vf a, vf b) {
#if defined(__AVX512F__)
  return _mm512_mask_blend_ps((__mmask16)bits, b, a);
#else
  vi lane = vi{} + 1;
  lane = lane << lane_index();
  const vi on = ((vi{} + (int32_t)bits) & lane) == lane;
  return on ? a : b;
#endif
}

TP_INLINE float hsum(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(x);
#else
  float s[W];
  storeu(s, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] += s[i + n];
  return s[0];
#endif
}

TP_INLINE float hmax(vf x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(x);
#else
  float s[W];
  storeu(s, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
  return s[0];
#endif
}

constexpr float kLog2E = 1.44269504088896341f;

TP_INLINE bool any_above(vf x, float limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(x, set1(limit), _CMP_GT_OQ) != 0;
#else
  return hmax(x) > limit;
#endif
}

// e^x for x < 88: 2^n times e^r for r = x - n ln 2, |r| <= ln 2 / 2, by a polynomial fitted for the least relative
// error. Within 0.91 ulp (1.2 without FMA) where results are float32: ln 2 in two parts, of which n times the first is
// exact, and a polynomial of degree 6 (3e-9) with p(0) = p'(0) = 1. Not kFine, for weights that are rounded to
// bfloat16: of degree 5 (9e-8) with p(0) = 1, and n ln 2 rounded once; 4e-7 in all. Results below about 2^-126 are 0
// or, on AVX-512, subnormal; 0 is exact for -inf, NaN stays.
template <bool kFine = true>
TP_INLINE vf vexp(vf x) {
#if defined(__AVX512F__)
  x = _mm512_max_ps(set1(-140.0f), x);  // the second operand wins when it is NaN
  const vf n = _mm512_roundscale_ps(x * kLog2E, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vf magic = set1(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  const vf shifted = (x < -88.0f ? set1(-88.0f) : x) * kLog2E + magic;
  const vf n = shifted - magic;
#endif
  vf y;
  if constexpr (kFine) {
    const vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    y = r * 1.38214533e-3f + 8.36866155e-3f;
    y = y * r + 4.16682549e-2f;
    y = y * r + 1.66665211e-1f;
    y = y * r + 0.49999994f;
    y = y * r + 1.0f;
    y = y * r + 1.0f;
  } else {
    const vf r = x - n * 0.693147180f;
    y = r * 8.28971341e-3f + 4.18978371e-2f;
    y = y * r + 1.66676477e-1f;
    y = y * r + 0.499991506f;
    y = y * r + 0.999999702f;
    y = y * r + 1.0f;
  }
#if defined(__AVX512F__)
  return _mm512_scalef_ps(y, n);
#else
  y = y * (vf)(((vi)shifted << 23) + 0x3f800000);
  return x < -87.33f ? vf{} : y;
#endif
}

// tanh: an odd polynomial near 0 (Cephes tanhf), 1 - 2 / (exp(2|x|) + 1) elsewhere, so that small logits keep their
// bits.
TP_INLINE vf vtanh(vf x) {
  const vf a = vabs(x);
  const vf z = x * x;
  vf p = z * -5.70498872745e-3f + 2.06390887954e-2f;
  p = p * z + -5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z + -3.33332819422e-1f;
  const vf small = p * z * x + x;
  const vf big = 1.0f - 2.0f / (vexp(a > 20.0f ? set1(40.0f) : a + a) + 1.0f);
  const vf signed_big = (vf)((vi)big | ((vi)x & (int32_t)0x80000000));
  return a < 0.625f ? small : signed_big;
}

// ---- storage types
TP_INLINE vu16 bytes_to_words(const void* p) {
#if defined(__AVX512F__)
  return (vu16)_mm256_cvtepu8_epi16(load_bits<__m128i>(p));
#elif defined(__AVX2__)
  return (vu16)_mm_cvtepu8_epi16(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(load_bits<vu8>(p), vu16);
#endif
}

// GCC 12 splits conversions to wider vectors into halves, but for AVX-512.
TP_INLINE vu words_to_ints(vu16 h) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return (vu)_mm256_cvtepu16_epi32((__m128i)h);
#elif defined(__SSE2__) && !defined(__AVX2__)
  return (vu)_mm_unpacklo_epi16(_mm_loadl_epi64((const __m128i*)&h), _mm_setzero_si128());
#else
  return __builtin_convertvector(h, vu);
#endif
}

TP_INLINE vf bf16_to_float(vu16 h) {
#if defined(__SSE2__) && !defined(__AVX2__)
  return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)&h));
#else
  return (vf)(words_to_ints(h) << 16);
#endif
}

TP_INLINE vf half_to_float(vu16 h) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)h);
#elif defined(__AVX2__)
  return _mm256_cvtph_ps((__m128i)h);
#else
  const vu u = words_to_ints(h);
  const vu magnitude = (u & 0x7fffu) << 13;
  const vf scaled =
      (vf)magnitude * 5.192296858534828e33f;  // 2^112 moves the exponent bias from 15 to 127, subnormals too
  const vu special = magnitude | 0x7f800000u;
  const vu bits = (u & 0x7c00u) == 0x7c00u ? special : (vu)scaled;
  return (vf)(bits | ((u & 0x8000u) << 16));
#endif
}

template <DType S>
TP_INLINE vf decode(const void* p) {
  if constexpr (S == DType::f32) {
    return load_bits<vf>(p);
  } else if constexpr (S == DType::bf16) {
    return bf16_to_float(load_bits<vu16>(p));
  } else if constexpr (S == DType::f16) {
    return half_to_float(load_bits<vu16>(p));
  } else if constexpr (S == DType::i8) {
#if defined(__AVX512F__)
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load_bits<__m128i>(p)));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(load_bits<vi8>(p), vi), vf);
#endif
  } else if constexpr (S == DType::e5m2) {
    return half_to_float(bytes_to_words(p) << 8);
  } else {
    // e4m3fn placed in a half has its exponent bias off by 8. Its one NaN, all ones, is the only pattern that carries:
    // into the top exponent bit, which makes the half NaN too.
    const vu16 u = bytes_to_words(p), magnitude = u & 0x7f;
    return half_to_float(((u & 0x80) << 8) | (magnitude << 7) | (((magnitude + 1) << 7) & 0x4000)) * 256.0f;
  }
}

template <DType S>
TP_INLINE constexpr int size_of() {
  return S == DType::f32 ? 4 : (S == DType::bf16 || S == DType::f16) ? 2 : 1;
}

// The first n < W elements, zeros behind them; reads no byte past them.
template <DType S>
TP_INLINE vf decode_partial(const void* p, int n) {
#if defined(__AVX512F__)
  if constexpr (S == DType::f32) return _mm512_maskz_loadu_ps((__mmask16)((1u << n) - 1), p);
  if constexpr (size_of<S>() == 2) {
    const __m256i raw = _mm256_maskz_loadu_epi16((__mmask16)((1u << n) - 1), p);
    return decode<S>(&raw);
  }
#endif
  alignas(64) char buffer[W * 4] = {0};
  for (int i = 0; i < n * size_of<S>(); ++i) buffer[i] = ((const char*)p)[i];
  return decode<S>(buffer);
}

TP_INLINE vu16 bf16_bits(vf x) {
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const vu quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(x != x ? quiet : rounded, vu16);
}

TP_INLINE vu16 half_bits(vf x) {
#if defined(__AVX512F__)
  return (vu16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__AVX2__)
  return (vu16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vu u = (vu)x & 0x7fffffffu;
  const vu normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  // Adding 0.5 to a tiny magnitude leaves the rounded subnormal in the low bits of the sum.
  const vu subnormal = (vu)((vf)u + 0.5f) - 0x3f000000u;
  vu r = u < (113u << 23) ? subnormal : normal;
  r = u >= 0x477ff000u ? vu{} + 0x7c00u : r;
  r = u > 0x7f800000u ? vu{} + 0x7e00u : r;
  return __builtin_convertvector(r | (((vu)x >> 16) & 0x8000u), vu16);
#endif
}

template <DType S>
TP_INLINE void encode(void* p, vf x) {
  if constexpr (S == DType::f32) {
    __builtin_memcpy(p, &x, sizeof(x));
  } else {
    const vu16 h = S == DType::bf16 ? bf16_bits(x) : half_bits(x);
    __builtin_memcpy(p, &h, sizeof(h));
  }
}

// For values that the type holds exactly: nothing is rounded.
template <DType S>
TP_INLINE void encode_exact(void* p, vf x) {
  if constexpr (S == DType::bf16) {
#if defined(__AVX512F__)
    const vu16 h = (vu16)_mm512_cvtepi32_epi16((__m512i)((vu)x >> 16));
#else
    const vu16 h = __builtin_convertvector((vu)x >> 16, vu16);
#endif
    __builtin_memcpy(p, &h, sizeof(h));
  } else {
    encode<S>(p, x);
  }
}

template <DType S>
TP_INLINE void encode_partial(void* p, vf x, int n) {
  alignas(64) char buffer[W * 4];
  encode<S>(buffer, x);
  for (int i = 0; i < n * size_of<S>(); ++i) ((char*)p)[i] = buffer[i];
}

// Sum the lanes of kReduce vectors: out[i] = sum of a[i].
TP_INLINE void reduce_lanes(const vf* a, float* out) {
#if defined(__AVX512F__)
  __m512 b[8], c[4], d[2];
  TP_UNROLL
  for (int i = 0; i < 8; ++i)
    b[i] = _mm512_add_ps(_mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]));
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(b[2 * i]), y = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  }
  TP_UNROLL
  for (int i = 0; i < 2; ++i)
    d[i] = _mm512_add_ps(_mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(c[2 * i], c[2 * i + 1], 0xdd));
  const __m512 sums = _mm512_add_ps(_mm512_shuffle_f32x4(d[0], d[1], 0x88), _mm512_shuffle_f32x4(d[0], d[1], 0xdd));
  _mm512_storeu_ps(out, sums);
#elif defined(__AVX2__)
  const __m256 x = _mm256_hadd_ps(_mm256_hadd_ps(a[0], a[1]), _mm256_hadd_ps(a[2], a[3]));
  const __m256 y = _mm256_hadd_ps(_mm256_hadd_ps(a[4], a[5]), _mm256_hadd_ps(a[6], a[7]));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20), _mm256_permute2f128_ps(x, y, 0x31)));
#else
  TP_UNROLL
  for (int i = 0; i < kReduce; i += 4) {  // pairs of halves, then of neighbours, four vectors at once
    const vf x = vf{a[i][0], a[i + 1][0], a[i][1], a[i + 1][1]} + vf{a[i][2], a[i + 1][2], a[i][3], a[i + 1][3]};
    const vf y =
        vf{a[i + 2][0], a[i + 3][0], a[i + 2][1], a[i + 3][1]} + vf{a[i + 2][2], a[i + 3][2], a[i + 2][3], a[i + 3][3]};
    storeu(out + i, vf{x[0], x[1], y[0], y[1]} + vf{x[2], x[3], y[2], y[3]});
  }
#endif
}

}  // namespace
}  // namespace torch_paged
