// How a tile of many query rows (prefill) stores what it multiplies: words of float32, or pairs of bf16. A block of 64
// keys and values is packed once for all rows, converted to the kernel's words on the way.
#pragma once

#include "rows.h"

namespace torch_paged {
namespace {

// Transpose W x W words in registers.
#if defined(__AVX512F__)
TP_INLINE void transpose(vf* words) {
  __m512i v[16], t[16];
  TP_UNROLL
  for (int i = 0; i < 16; ++i) v[i] = (__m512i)words[i];
  TP_UNROLL
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  }
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    v[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    v[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
  }
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    v[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    v[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    v[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
  TP_UNROLL
  for (int i = 0; i < 16; ++i) words[i] = (vf)v[i];
}
#elif defined(__AVX2__)
TP_INLINE void transpose(vf* v) {
  __m256 t[8], u[8];
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(v[2 * i], v[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(v[2 * i], v[2 * i + 1]);
  }
  TP_UNROLL
  for (int i = 0; i < 8; i += 4) {
    u[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    u[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    u[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    u[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(u[i], u[i + 4], 0x31);
  }
}
#else
TP_INLINE void transpose(vf* v) {
  for (int i = 0; i < W; ++i)
    for (int j = i + 1; j < W; ++j) {
      const float x = v[i][j];
      v[i][j] = v[j][i];
      v[j][i] = x;
    }
}
#endif

struct TileF32 {
  using Query = float;
  static constexpr DType kStorage = DType::f32;
  static constexpr int kLanesPerWord = 1;
  static constexpr int kValuePad = W;  // accumulator lanes come in multiples of it

  // Words [w, w + W) of a row stored as S; zeros from `dim` lanes on, where no byte is read.
  template <DType S, bool kPartial>
  static TP_INLINE vf load_words(const char* row, int64_t w, int64_t dim) {
    const char* p = row + w * size_of<S>();
    return kPartial ? decode_partial<S>(p, (int)(dim - w)) : decode<S>(p);
  }

  template <DType S, bool kPartial>
  static TP_INLINE void pack_values_at(const char* const* rows, int count, int64_t w, int64_t dim, int64_t ld,
                                       uint32_t* out) {
    for (int t = 0; t < count; ++t) storeu((float*)out + t * ld + w, load_words<S, kPartial>(rows[t], w, dim));
  }

  static TP_INLINE vf step(vf c, const char* a, vf b) { return c + set1(load_bits<float>(a)) * b; }
  static TP_INLINE void put_probabilities(uint32_t* p, int i, vf x) { storeu((float*)p + i, x); }
  static TP_INLINE void get_probabilities(const uint32_t* p, float* out) { __builtin_memcpy(out, p, 64 * 4); }
};

#if defined(__AVX512BF16__)
struct TileDot {
  using Query = uint16_t;
  static constexpr DType kStorage = DType::bf16;
  static constexpr int kLanesPerWord = 2;
  static constexpr int kValuePad = 32;

  template <DType S, bool kPartial>
  static TP_INLINE __m512i load_words(const char* row, int64_t w, int64_t dim) {
    const char* p = row + 2 * w * size_of<S>();
    const int left = (int)(dim - 2 * w);
    if constexpr (S == DType::bf16) {
      return kPartial ? _mm512_maskz_loadu_epi16(lanes_mask(left), p) : _mm512_loadu_si512(p);
    } else {
      vf lo = vf{}, hi = vf{};
      lo = !kPartial || left >= W ? decode<S>(p) : decode_partial<S>(p, left);
      if (!kPartial || left >= 2 * W)
        hi = decode<S>(p + W * size_of<S>());
      else if (left > W)
        hi = decode_partial<S>(p + W * size_of<S>(), left - W);
      return (__m512i)_mm512_cvtne2ps_pbh(hi, lo);
    }
  }

  template <DType S, bool kPartial>
  static TP_INLINE void pack_values_at(const char* const* rows, int count, int64_t w, int64_t dim, int64_t ld,
                                       uint32_t* out) {
    const __m512i first = (__m512i)(lane_index() * 0x10001 + 0x200000), second = (__m512i)((vi)first + 0x100010);
    for (int t = 0; t < count; t += 2) {
      const __m512i a = load_words<S, kPartial>(rows[t], w, dim), b = load_words<S, kPartial>(rows[t + 1], w, dim);
      uint32_t* to = out + t / 2 * ld + 2 * w;
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(a, first, b));
      _mm512_storeu_si512(to + W, _mm512_permutex2var_epi16(a, second, b));
    }
  }

  static TP_INLINE vf step(vf c, const char* a, vf b) {
    return _mm512_dpbf16_ps(c, (__m512bh)_mm512_set1_epi32(load_bits<int>(a)), (__m512bh)b);
  }
  static TP_INLINE void put_probabilities(uint32_t* p, int i, vf x) {
    _mm256_storeu_si256((__m256i*)(p + i / 2), (__m256i)_mm512_cvtneps_pbh(x));
  }
  static TP_INLINE void get_probabilities(const uint32_t* p, float* out) {
    for (int i = 0; i < 64; i += W) storeu(out + i, decode<DType::bf16>(p + i / 2));
  }
};
#endif

// 64 rows of keys -> out[word][64]
template <class Kernel, DType S>
void pack_keys(const char* const* rows, int count, int64_t dim, uint32_t* out) {
  constexpr int kLanes = W * Kernel::kLanesPerWord;
  for (int r = 0; r < count; r += W)
    for (int64_t i = 0; i < dim; i += kLanes) {
      const int64_t w = i / Kernel::kLanesPerWord;
      vf v[W];
      if (dim - i >= kLanes) {
        TP_UNROLL
        for (int k = 0; k < W; ++k) v[k] = (vf)Kernel::template load_words<S, false>(rows[r + k], w, dim);
      } else {
        TP_UNROLL
        for (int k = 0; k < W; ++k) v[k] = (vf)Kernel::template load_words<S, true>(rows[r + k], w, dim);
      }
      transpose(v);
      TP_UNROLL
      for (int k = 0; k < W; ++k) storeu((float*)out + (w + k) * 64 + r, v[k]);
    }
}

// Rows of values -> out[step][ld]: row by row, or interleaved pairs of rows.
template <class Kernel, DType S>
void pack_values(const char* const* rows, int count, int64_t dim, int64_t ld, uint32_t* out) {
  constexpr int kLanes = W * Kernel::kLanesPerWord;
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes)
    Kernel::template pack_values_at<S, false>(rows, count, i / Kernel::kLanesPerWord, dim, ld, out);
  if (i < dim) Kernel::template pack_values_at<S, true>(rows, count, i / Kernel::kLanesPerWord, dim, ld, out);
}

// Both for a storage type known at run time: one of the caches' types, or the kernel's own.
#define TP_WITH_STORAGE(CALL)                                  \
  switch (from) {                                              \
    case DType::f32:                                           \
      if constexpr (Kernel::kStorage == DType::f32) CALL(f32); \
      break;                                                   \
    case DType::f16:                                           \
      if constexpr (Kernel::kStorage == DType::f32) CALL(f16); \
      break;                                                   \
    case DType::bf16:                                          \
      CALL(bf16);                                              \
      break;                                                   \
    case DType::i8:                                            \
      CALL(i8);                                                \
      break;                                                   \
    case DType::e4m3:                                          \
      CALL(e4m3);                                              \
      break;                                                   \
    default:                                                   \
      CALL(e5m2);                                              \
      break;                                                   \
  }
template <class Kernel>
TP_INLINE void pack_keys(DType from, const char* const* rows, int count, int64_t dim, uint32_t* out) {
#define TP_PACK(S) pack_keys<Kernel, DType::S>(rows, count, dim, out)
  TP_WITH_STORAGE(TP_PACK)
#undef TP_PACK
}

template <class Kernel>
TP_INLINE void pack_values(DType from, const char* const* rows, int count, int64_t dim, int64_t ld, uint32_t* out) {
#define TP_PACK(S) pack_values<Kernel, DType::S>(rows, count, dim, ld, out)
  TP_WITH_STORAGE(TP_PACK)
#undef TP_PACK
}

// One row, unpacked.
template <class Kernel, DType S>
TP_INLINE void load_words(const char* row, int64_t dim, uint32_t* out) {
  constexpr int kLanes = W * Kernel::kLanesPerWord;
  int64_t i = 0, w = 0;
  for (; i + kLanes <= dim; i += kLanes, w += W)
    storeu((float*)out + w, (vf)Kernel::template load_words<S, false>(row, w, dim));
  if (i < dim) storeu((float*)out + w, (vf)Kernel::template load_words<S, true>(row, w, dim));
}

template <class Kernel>
TP_INLINE void load_words(DType from, const char* row, int64_t dim, uint32_t* out) {
#define TP_LOAD(S) load_words<Kernel, DType::S>(row, dim, out)
  TP_WITH_STORAGE(TP_LOAD)
#undef TP_LOAD
}
#undef TP_WITH_STORAGE

}  // namespace
}  // namespace torch_paged
