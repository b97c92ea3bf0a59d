// Quantised rows used in place by products in bf16. Every int8, e4m3 and e5m2 value is exact in bf16: two table
// look-ups by the low seven bits of 64 stored bytes give both bytes of the bf16, the sign bit is or-ed in. Scales
// belong to the logits and probabilities, not to the rows.
//
// Unpacking bytes leaves 64 lanes in the order 0-7 16-23 32-39 48-55 | 8-15 24-31 40-47 56-63. The query has that order
// too, and so have rows that are staged for RowsDot; accumulators get their natural order when they leave the item.
#pragma once

#include "rows.h"

namespace torch_paged {
namespace {

#if defined(__AVX512BF16__)
// n * 2^exponent, n < 256, in bf16
constexpr uint16_t bf16_of(int n, int exponent) {
  if (n == 0) return 0;
  int top = 0;
  while (n >> (top + 1)) ++top;
  return (uint16_t)(((127 + top + exponent) << 7) | ((n << (7 - top)) & 0x7f));
}

// The bf16 of a stored byte without its sign; for int8, of a magnitude.
constexpr uint16_t bf16_of_byte(DType s, int byte) {
  if (s == DType::i8) return bf16_of(byte, 0);
  const int mantissa_bits = s == DType::e4m3 ? 3 : 2, bias = s == DType::e4m3 ? 7 : 15;
  const int exponent = byte >> mantissa_bits, mantissa = byte & ((1 << mantissa_bits) - 1);
  if (s == DType::e4m3 ? byte == 0x7f : exponent == 31 && mantissa) return 0x7fc0;
  if (s == DType::e5m2 && exponent == 31) return 0x7f80;
  if (exponent == 0) return bf16_of(mantissa, 1 - bias - mantissa_bits);
  return bf16_of(mantissa + (1 << mantissa_bits), exponent - bias - mantissa_bits);
}

template <DType S>
struct ByteTable {
  alignas(64) uint8_t high[128], low[128];
  constexpr ByteTable() : high(), low() {
    for (int i = 0; i < 128; ++i) {
      high[i] = (uint8_t)(bf16_of_byte(S, i) >> 8);
      low[i] = (uint8_t)bf16_of_byte(S, i);
    }
  }
};
template <DType S>
constexpr ByteTable<S> kByteTable{};

// bf16 of 64 stored bytes; the tables stay in registers.
template <DType S>
struct ByteReader {
  __m512i high0, high1, low0, low1;

  TP_INLINE ByteReader() {
    high0 = _mm512_load_si512(kByteTable<S>.high);
    high1 = _mm512_load_si512(kByteTable<S>.high + 64);
    low0 = _mm512_load_si512(kByteTable<S>.low);
    low1 = _mm512_load_si512(kByteTable<S>.low + 64);
  }

  TP_INLINE void read(__m512i bytes, __m512bh* out) const {
    const __m512i index = S == DType::i8 ? _mm512_abs_epi8(bytes) : bytes;
    const __m512i magnitude = _mm512_permutex2var_epi8(high0, index, high1);
    const __m512i low = _mm512_permutex2var_epi8(low0, index, low1);
    __m512i high = _mm512_ternarylogic_epi32(magnitude, bytes, _mm512_set1_epi8((char)0x80), 0xf8);
    if constexpr (S == DType::i8)  // the magnitude 128 has no entry of its own
      high = _mm512_mask_mov_epi8(high, _mm512_movepi8_mask(index), _mm512_set1_epi8((char)0xc3));
    out[0] = (__m512bh)_mm512_unpacklo_epi8(low, high);
    out[1] = (__m512bh)_mm512_unpackhi_epi8(low, high);
  }
};

template <bool kPartial>
TP_INLINE __m512i load_bytes(const char* p, __mmask64 lanes) {
  return kPartial ? _mm512_maskz_loadu_epi8(lanes, p) : _mm512_loadu_si512(p);
}

template <bool kPartial>
TP_INLINE __m256i load_half(const char* p, __mmask32 lanes) {
  return kPartial ? _mm256_maskz_loadu_epi8(lanes, p) : _mm256_loadu_si256((const __m256i*)p);
}

template <DType S>
struct RowsBytes {
  using Staged = RowsDot;
  static constexpr DType kStorage = S;
  static constexpr int kMaxRows = 4, kRowsInPlace = kMaxDirectRows;  // always
  static constexpr int kStagedPad = 64;
  static constexpr bool kStages = true;
  using Query = uint16_t;

  static int64_t query_size(int64_t dim) { return round_up(dim, 64); }

  // From the natural order to that of unpacked bytes.
  static void arrange(char* row, int64_t dim) {
    for (char* p = row; p < row + 2 * dim; p += 128) {
      const __m512i x = _mm512_loadu_si512(p), y = _mm512_loadu_si512(p + 64);
      _mm512_storeu_si512(p, _mm512_shuffle_i32x4(x, y, 0x88));
      _mm512_storeu_si512(p + 64, _mm512_shuffle_i32x4(x, y, 0xdd));
    }
  }

  static void load_query(DType, const void* source, int64_t dim, uint16_t* out) {
    const int64_t padded = query_size(dim);
    __builtin_memcpy(out, source, 2 * dim);
    for (int64_t i = dim; i < padded; ++i) out[i] = 0;
    arrange((char*)out, padded);
  }

  // 32 lanes of 8 * N keys. Two keys share a register, so that fewer lanes are left to be added up.
  template <int RG, int N, bool kPartial>
  static TP_INLINE void dot_step(const ByteReader<S>& reader, const uint16_t* query, int64_t ld, const char* const* key,
                                 int64_t c, __mmask32 lanes, vf* acc) {
    const uint16_t* from = query + c / 64 * 64 + c % 64 / 2;
    __m512bh q[2 * RG];
    TP_UNROLL
    for (int i = 0; i < 2 * RG; ++i)
      q[i] = (__m512bh)_mm512_broadcast_i64x4(_mm256_loadu_si256((const __m256i*)(from + i % RG * ld + i / RG * 32)));
    TP_UNROLL
    for (int i = 0; i < 4 * N; ++i) {
      const char* const* pair = key + i / 4 * 8 + i % 4;
      const __m512i x = _mm512_castsi256_si512(load_half<kPartial>(pair[0] + c, lanes));
      __m512bh k[2];
      reader.read(_mm512_mask_broadcast_i64x4(x, 0xf0, load_half<kPartial>(pair[4] + c, lanes)), k);
      TP_UNROLL
      for (int j = 0; j < 2 * RG; ++j) {
        vf& a = acc[j % RG * 4 * N + i];
        a = _mm512_dpbf16_ps(a, q[j], k[j / RG]);
      }
    }
  }

  // Sums of the quarters of each of four vectors.
  static TP_INLINE __m512 add_within_quarters(const vf* a) {
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512d u = _mm512_castps_pd(x), v = _mm512_castps_pd(y);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(u, v)), _mm512_castpd_ps(_mm512_unpackhi_pd(u, v)));
  }

  template <int RG>
  static TP_INLINE void logits(const uint16_t* query, int64_t ld, const UnitRows& unit, int64_t dim, float* s,
                               const UnitRows& next, int64_t next_bytes) {
    constexpr int N = RG > 2 ? 1 : 2;
    const ByteReader<S> reader;
    const int64_t whole = dim / 32 * 32;
    LinesAhead ahead(next.key, next.count, next_bytes);
    for (int t = 0; t < unit.count; t += 8 * N) {
      vf acc[RG * 4 * N];
      TP_UNROLL
      for (int i = 0; i < RG * 4 * N; ++i) acc[i] = vf{};
      for (int64_t c = 0; c < whole; c += 32) {
        ahead.fetch(4 * N);
        if (c % 64 == 0 && t + 8 * N < unit.count) fetch_rows<8 * N>(unit.key + t + 8 * N, c, 64);
        dot_step<RG, N, false>(reader, query, ld, unit.key + t, c, 0, acc);
      }
      if (whole < dim) dot_step<RG, N, true>(reader, query, ld, unit.key + t, whole, (1u << (dim - whole)) - 1, acc);
      TP_UNROLL
      for (int i = 0; i < RG * N; i += 2) {
        const __m512 x = add_within_quarters(acc + 4 * i),
                     y = i + 1 < RG * N ? add_within_quarters(acc + 4 * i + 4) : x;
        const vf sums = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
        float* out = s + i / N * 64 + t;
        if constexpr (N == 2) {
          storeu(out, sums);
        } else {
          _mm256_storeu_ps(out, _mm512_castps512_ps256(sums));
          if (i + 1 < RG) _mm256_storeu_ps(out + 64, _mm512_extractf32x8_ps(sums, 1));
        }
      }
    }
  }

  // 64 lanes
  template <int RG, bool kPartial>
  static TP_INLINE void accumulate_columns(const ByteReader<S>& reader, const uint32_t (*pairs)[32],
                                           const UnitRows& unit, int64_t h, int64_t dim, float* acc, int64_t ld,
                                           LinesAhead& ahead, int lines) {
    vf a[RG * 4];
    TP_UNROLL
    for (int i = 0; i < RG * 4; ++i) a[i] = loadu(acc + (i / 4) * ld + h + (i % 4) * W);
    const __mmask64 lanes = dim - h >= 64 ? ~0ull : (1ull << (dim - h)) - 1;
    for (int t = 0; t < unit.count; t += 2) {
      ahead.fetch(lines);
      if (t + kValuesAhead < unit.count) fetch_rows<2>(unit.value + t + kValuesAhead, h, kPartial ? 1 : 64);
      const __m512i x = load_bytes<kPartial>(unit.value[t] + h, lanes);
      const __m512i y = load_bytes<kPartial>(unit.value[t + 1] + h, lanes);
      __m512bh v[4];
      reader.read(_mm512_unpacklo_epi8(x, y), v);
      reader.read(_mm512_unpackhi_epi8(x, y), v + 2);
      TP_UNROLL
      for (int g = 0; g < RG; ++g) {
        const __m512bh p = (__m512bh)_mm512_set1_epi32((int)pairs[g][t / 2]);
        TP_UNROLL
        for (int j = 0; j < 4; ++j) a[g * 4 + j] = _mm512_dpbf16_ps(a[g * 4 + j], p, v[j]);
      }
    }
    TP_UNROLL
    for (int i = 0; i < RG * 4; ++i) storeu(acc + (i / 4) * ld + h + (i % 4) * W, a[i]);
  }

  template <int RG>
  static TP_INLINE void accumulate(const float* p, const UnitRows& unit, int64_t dim, float* acc, int64_t ld,
                                   const UnitRows& next, int64_t next_bytes) {
    alignas(64) uint32_t pairs[RG][32];
    TP_UNROLL
    for (int g = 0; g < RG; ++g) pack_pairs(p + g * 64, unit.count, pairs[g]);
    const ByteReader<S> reader;
    LinesAhead ahead(next.value, next.count, next_bytes);
    const int64_t groups = (dim + 63) / 64;
    const int lines = (int)((2 * lines_of(next_bytes) + groups - 1) / groups);
    int64_t h = 0;
    for (; h + 64 <= dim; h += 64) accumulate_columns<RG, false>(reader, pairs, unit, h, dim, acc, ld, ahead, lines);
    if (h < dim) accumulate_columns<RG, true>(reader, pairs, unit, h, dim, acc, ld, ahead, lines);
  }

  static TP_INLINE vf natural(const float* acc, int64_t i) {
    const float* from = acc + i / 64 * 64 + i % 64 / 4;
    __m512 x = _mm512_castps128_ps512(_mm_loadu_ps(from));
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from + 16), 1);
    x = _mm512_insertf32x4(x, _mm_loadu_ps(from + 32), 2);
    return _mm512_insertf32x4(x, _mm_loadu_ps(from + 48), 3);
  }
};
#endif

}  // namespace
}  // namespace torch_paged
