// int8 rows used in place by integer dot products: nothing is widened to floating point. A query row becomes 16-bit
// fixed point, the probabilities of a unit two 8-bit limbs, so that the products and sums of a unit are exact integers.
// Rounded are the query, to 2^-16 of the largest lane of its row, and the probabilities, to 2^-17 of the largest of
// their unit; bfloat16 rounds the probabilities of a flat softmax to 2^-9. Float32 queries must not be rounded and do
// not come here.
#pragma once

#include "rows_bytes.h"

namespace torch_paged {
namespace {

#if defined(__AVX512BF16__)
// g++ copies the sum twice around its intrinsics for these two.
TP_INLINE void dot_bytes(__m512i& sum, __m512i u, __m512i v) {  // u unsigned
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(v));
}
TP_INLINE void dot_words(__m512i& sum, __m512i x, __m512i y) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}

// Sums of the lanes of 16 vectors.
TP_INLINE __m512i reduce_integers(const __m512i* a) {
  __m512i b[8], c[4], d[2];
  TP_UNROLL
  for (int i = 0; i < 8; ++i)
    b[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
  TP_UNROLL
  for (int i = 0; i < 4; ++i)
    c[i] =
        _mm512_add_epi32(_mm512_unpacklo_epi64(b[2 * i], b[2 * i + 1]), _mm512_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
  TP_UNROLL
  for (int i = 0; i < 2; ++i)
    d[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0x88),
                            _mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(d[0], d[1], 0x88), _mm512_shuffle_i32x4(d[0], d[1], 0xdd));
}

// Two registers of two rows of 32 bytes each -> the four bytes of each column side by side.
struct QuadTable {
  alignas(64) uint8_t byte[128];
  constexpr QuadTable() : byte() {
    for (int i = 0; i < 128; ++i) byte[i] = (uint8_t)(i % 4 * 32 + i / 4);
  }
};
constexpr QuadTable kQuadTable{};

struct RowsInt8 {
  static constexpr DType kStorage = DType::i8;
  static constexpr bool kStages = false;
  static constexpr int kMaxRows = 8, kRowsAtOnce = 4;
  using Query = int16_t;

  // The value of one stands behind the lanes.
  static int64_t query_size(int64_t dim) { return round_up(dim, 64) + 32; }
  static float query_unit(const int16_t* row, int64_t dim) { return load_bits<float>(row + round_up(dim, 64)); }

  // The row must be finite.
  static void load_query(DType dtype, const void* source, int64_t dim, int16_t* out) {
    vf top = vf{};
    for (int64_t i = 0; i < dim; i += W) top = vmax(top, vabs(load_lanes(dtype, source, i, lanes_left(dim, i))));
    const float largest = hmax(top);
    int exponent = (int)(load_bits<uint32_t>(&largest) >> 23) - 14;
    for (int64_t lanes = 512; lanes < dim; lanes *= 2) ++exponent;  // sums of `dim` products fit an int32
    if (exponent < 14) exponent = 14;
    const uint32_t powers[2] = {(uint32_t)exponent << 23, (uint32_t)(254 - exponent) << 23};
    const float unit = load_bits<float>(powers), per_unit = load_bits<float>(powers + 1);
    for (int64_t i = 0; i < round_up(dim, 64); i += W) {
      const vf x = i < dim ? load_lanes(dtype, source, i, lanes_left(dim, i)) : vf{};
      _mm256_storeu_si256((__m256i*)(out + i), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x * per_unit)));
    }
    __builtin_memcpy(out + round_up(dim, 64), &unit, sizeof(unit));
  }

  // 32 lanes
  template <int R, bool kPartial>
  static TP_INLINE void dot_step(const int16_t* query, int64_t ld, const char* const* key, int64_t c, __mmask32 lanes,
                                 __m512i* acc) {
    constexpr int NK = keys_per_tile<R>();
    __m512i k[NK];
    TP_UNROLL
    for (int i = 0; i < NK; ++i) k[i] = _mm512_cvtepi8_epi16(load_half<kPartial>(key[i] + c, lanes));
    TP_UNROLL
    for (int g = 0; g < R; ++g) {
      const __m512i q = _mm512_loadu_si512(query + g * ld + c);
      TP_UNROLL
      for (int i = 0; i < NK; ++i) dot_words(acc[g * NK + i], k[i], q);
    }
  }

  template <int RG>
  static TP_INLINE void logits(const int16_t* query, int64_t ld, const UnitRows& unit, int64_t dim, float* s,
                               const UnitRows& next, int64_t next_bytes) {
    constexpr int R = RG < kRowsAtOnce ? RG : kRowsAtOnce, NK = keys_per_tile<R>();
    constexpr int kAhead = NK > kKeysAhead ? NK : kKeysAhead;
    const int64_t whole = dim / 32 * 32;
    alignas(64) float value_of_one[RG / R * 16] = {};
    for (int i = 0; i < RG * NK; ++i) value_of_one[i] = query_unit(query + i / NK * ld, dim);
    LinesAhead ahead(next.key, next.count, next_bytes);
    for (int t = 0; t < unit.count; t += NK) {
      TP_UNROLL
      for (int first = 0; first < RG; first += R) {
        const int16_t* rows = query + first * ld;
        __m512i acc[16];
        TP_UNROLL
        for (int i = 0; i < 16; ++i) acc[i] = _mm512_setzero_si512();
        for (int64_t c = 0; c < whole; c += 32) {
          if (first == 0 && c % 64 == 0) {
            ahead.fetch(NK);
            if (t + kAhead < unit.count) fetch_rows<NK>(unit.key + t + kAhead, c, 64);
          }
          dot_step<R, false>(rows, ld, unit.key + t, c, 0, acc);
        }
        if (whole < dim) dot_step<R, true>(rows, ld, unit.key + t, whole, lanes_mask(dim - whole), acc);
        alignas(64) float sums[16];
        storeu(sums, _mm512_cvtepi32_ps(reduce_integers(acc)) * loadu(value_of_one + first / R * 16));
        TP_UNROLL
        for (int g = 0; g < R; ++g) __builtin_memcpy(s + (first + g) * 64 + t, sums + g * NK, 4 * NK);
      }
    }
  }

  // A row of zeros has a scale of 1, which would take the bits of all other keys where their scales are small.
  static void drop_zero_rows(const UnitRows& unit, int64_t dim, float* value_scale) {
    uint64_t suspects = 0;
    for (int t = 0; t < unit.count; t += W)
      suspects |= (uint64_t)_mm512_cmp_ps_mask(loadu(value_scale + t), set1(1.0f), _CMP_EQ_OQ) << t;
    for (; suspects; suspects &= suspects - 1) {
      const int t = __builtin_ctzll(suspects);
      bool zero = true;
      for (int64_t h = 0; zero && h < dim; h += 32)
        zero =
            _mm256_test_epi8_mask(load_half<true>(unit.value[t] + h, lanes_mask(dim - h)), _mm256_set1_epi8(-1)) == 0;
      if (zero) value_scale[t] = 0.0f;
    }
  }

  // High and low limbs of the probabilities of a unit; returns the value of one.
  static TP_INLINE float split_weights(const float* p, int count, char* high, char* low) {
    __m512i top = _mm512_setzero_si512();  // in the order of integers NaN is larger than every number
    for (int t = 0; t < count; t += W) top = _mm512_max_epu32(top, _mm512_loadu_si512(p + t));
    const uint32_t bits = _mm512_reduce_max_epu32(top);
    if (bits >= 0x7f800000u) return __builtin_nanf("");
    const float largest = load_bits<float>(&bits);
    const float factor = largest > 1e-33f ? 65535.0f / largest : 6.5e37f;  // finite
    const float unit = largest > 1e-33f ? largest * (1.0f / 65535) : 1.0f / 6.5e37f;
    for (int t = 0; t < count; t += W) {
      const __m512i x = _mm512_cvtps_epi32(loadu(p + t) * factor);
      _mm_storeu_si128((__m128i*)(high + t), _mm512_cvtepi32_epi8(_mm512_srli_epi32(x, 8)));
      _mm_storeu_si128((__m128i*)(low + t), _mm512_cvtepi32_epi8(x));
    }
    return unit;
  }

  // The weights of a row: 64 high limbs, 64 low limbs.
  struct Weights {
    char limb[2][64];
    float unit;
  };

  // 32 lanes
  template <int R, bool kPartial>
  static TP_INLINE void accumulate_columns(const Weights* weights, const UnitRows& unit, int64_t h, int64_t dim,
                                           float* acc, int64_t ld, LinesAhead& ahead, int lines) {
    const __m512i quads0 = _mm512_load_si512(kQuadTable.byte), quads1 = _mm512_load_si512(kQuadTable.byte + 64);
    const __mmask32 lanes = lanes_mask(dim - h);
    __m512i a[R * 4];
    TP_UNROLL
    for (int i = 0; i < R * 4; ++i) a[i] = _mm512_setzero_si512();
    for (int t = 0; t < unit.count; t += 4) {
      ahead.fetch(lines);
      if (h % 64 == 0 && t + kValuesAhead < unit.count)
        fetch_rows<4>(unit.value + t + kValuesAhead, h, dim - h < 64 ? 1 : 64);
      const char* const* row = unit.value + t;
      const __m512i x = _mm512_castsi256_si512(load_half<kPartial>(row[0] + h, lanes));
      const __m512i xy = _mm512_mask_broadcast_i64x4(x, 0xf0, load_half<kPartial>(row[1] + h, lanes));
      const __m512i z = _mm512_castsi256_si512(load_half<kPartial>(row[2] + h, lanes));
      const __m512i zw = _mm512_mask_broadcast_i64x4(z, 0xf0, load_half<kPartial>(row[3] + h, lanes));
      const __m512i v0 = _mm512_permutex2var_epi8(xy, quads0, zw), v1 = _mm512_permutex2var_epi8(xy, quads1, zw);
      TP_UNROLL
      for (int g = 0; g < R; ++g) TP_UNROLL
      for (int l = 0; l < 2; ++l) {
        const __m512i p = _mm512_set1_epi32(load_bits<int32_t>(weights[g].limb[l] + t));
        dot_bytes(a[g * 4 + l * 2], p, v0);
        dot_bytes(a[g * 4 + l * 2 + 1], p, v1);
      }
    }
    TP_UNROLL
    for (int g = 0; g < R; ++g) TP_UNROLL
    for (int j = 0; j < 2; ++j) {
      float* out = acc + g * ld + h + j * W;
      const __m512i sum = _mm512_add_epi32(_mm512_slli_epi32(a[g * 4 + j], 8), a[g * 4 + 2 + j]);
      storeu(out, loadu(out) + _mm512_cvtepi32_ps(sum) * weights[g].unit);
    }
  }

  template <int RG>
  static TP_INLINE void accumulate(const float* p, const UnitRows& unit, int64_t dim, float* acc, int64_t ld,
                                   const UnitRows& next, int64_t next_bytes) {
    constexpr int R = RG < kRowsAtOnce ? RG : kRowsAtOnce;
    alignas(64) Weights weights[RG];
    TP_UNROLL
    for (int g = 0; g < RG; ++g)
      weights[g].unit = split_weights(p + g * 64, unit.count, weights[g].limb[0], weights[g].limb[1]);
    LinesAhead ahead(next.value, next.count, next_bytes);
    const int64_t groups = (dim + 31) / 32;
    const int lines = (int)((4 * lines_of(next_bytes) + groups - 1) / groups);
    TP_UNROLL
    for (int first = 0; first < RG; first += R) {
      const Weights* w = weights + first;
      float* out = acc + first * ld;
      int64_t h = 0;
      for (; h + 32 <= dim; h += 32) accumulate_columns<R, false>(w, unit, h, dim, out, ld, ahead, lines);
      if (h < dim) accumulate_columns<R, true>(w, unit, h, dim, out, ld, ahead, lines);
    }
  }

  static TP_INLINE vf natural(const float* acc, int64_t i) { return loadu(acc + i); }
};
#endif

}  // namespace
}  // namespace torch_paged
