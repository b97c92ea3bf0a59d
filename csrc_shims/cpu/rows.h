// Products on a few query rows, keys and values used in place (decode, speculative tokens). A group of up to four rows
// times a few keys is one register tile of dot products; the value product keeps 4 rows x kValueVectors vectors of the
// output in registers. Prefetches of the next unit's rows are spread through both products.
#pragma once

#include "lanes.h"

namespace torch_paged {
namespace {

#if defined(__AVX512F__)
constexpr int kValueVectors = 4;
#else
constexpr int kValueVectors = 2;
#endif

// Rows of a (key block, kv head) unit, and those of the unit after it.
struct UnitRows {
  const char* key[64];
  const char* value[64];
  int count = 0;  // a multiple of 16

  UnitRows() {}  // the pointers stay unset: `count` says how many are
};

TP_INLINE void prefetch_bytes(const char* row, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; i += 64) prefetch_l2(row + i);
}

// One cache line of each of N rows: a burst of whole rows would fill the line buffers and stall the product.
template <int N>
TP_INLINE void prefetch_lines(const char* const* rows, int64_t offset, int64_t row_bytes) {
  if (offset >= row_bytes) return;
  TP_UNROLL
  for (int i = 0; i < N; ++i) prefetch_l2(rows[i] + offset);
}

// Keys in a register tile of RG query rows.
template <int RG>
constexpr int keys_per_tile() {
  return RG == 1 ? kReduce : RG == 2 ? kReduce / 2 : kReduce / 4;
}

// acc[i] of row i / NK, key i % NK -> s[row * 64 + key]
template <int RG, int NK>
TP_INLINE void store_logits(const vf* acc, float* s) {
  alignas(64) float sums[kReduce];
  reduce_lanes(acc, sums);
  TP_UNROLL
  for (int g = 0; g < RG; ++g) __builtin_memcpy(s + g * 64, sums + g * NK, 4 * NK);
}

// float32 arithmetic on rows stored as S.
template <DType S>
struct RowsF32 {
  using Staged = RowsF32<DType::f32>;
  static constexpr DType kStorage = S;
  static constexpr int kQueryPad = W, kStagedPad = 1;
  using Query = float;

  static void arrange(char*, int64_t) {}

  static void load_query(DType dtype, const void* source, int64_t dim, float* out) {
    for (int64_t i = 0; i < dim; i += W) storeu(out + i, load_lanes(dtype, source, i, lanes_left(dim, i)));
  }

  // s[g][t] = query row g . key t; query (RG, ld) padded with zeros to a multiple of W.
  template <int RG>
  static TP_INLINE void logits(const float* query, int64_t ld, const UnitRows& unit, int64_t dim, float* s,
                               const UnitRows& next, int64_t next_bytes) {
    constexpr int NK = keys_per_tile<RG>();
    const int64_t whole = dim / W * W;
    for (int t = 0; t < unit.count; t += NK) {
      vf acc[kReduce];
      TP_UNROLL
      for (int i = 0; i < kReduce; ++i) acc[i] = vf{};
      const int64_t ahead = t < next.count ? next_bytes : 0;
      for (int64_t c = 0; c < whole; c += W) {
        prefetch_lines<NK>(next.key + t, c / W * 64, ahead);
        vf k[NK];
        TP_UNROLL
        for (int i = 0; i < NK; ++i) k[i] = decode<S>(unit.key[t + i] + c * size_of<S>());
        TP_UNROLL
        for (int g = 0; g < RG; ++g) {
          const vf q = loadu(query + g * ld + c);
          TP_UNROLL
          for (int i = 0; i < NK; ++i) acc[g * NK + i] += q * k[i];
        }
      }
      if (whole < dim) {
        TP_UNROLL
        for (int i = 0; i < NK; ++i) {
          const vf k = decode_partial<S>(unit.key[t + i] + whole * size_of<S>(), (int)(dim - whole));
          TP_UNROLL
          for (int g = 0; g < RG; ++g) acc[g * NK + i] += loadu(query + g * ld + whole) * k;
        }
      }
      store_logits<RG, NK>(acc, s + t);
    }
  }

  template <int RG, int NV>
  static TP_INLINE void accumulate_columns(const float* p, const UnitRows& unit, int64_t h, float* acc, int64_t ld,
                                           const UnitRows& next, int64_t next_begin, int64_t next_end) {
    vf a[RG * NV];
    TP_UNROLL
    for (int i = 0; i < RG * NV; ++i) a[i] = loadu(acc + (i / NV) * ld + h + (i % NV) * W);
    for (int t = 0; t < unit.count; ++t) {
      if (t < next.count) prefetch_bytes(next.value[t], next_begin, next_end);
      vf v[NV];
      TP_UNROLL
      for (int j = 0; j < NV; ++j) v[j] = decode<S>(unit.value[t] + (h + j * W) * size_of<S>());
      TP_UNROLL
      for (int g = 0; g < RG; ++g) {
        const vf pg = set1(p[g * 64 + t]);
        TP_UNROLL
        for (int j = 0; j < NV; ++j) a[g * NV + j] += pg * v[j];
      }
    }
    TP_UNROLL
    for (int i = 0; i < RG * NV; ++i) storeu(acc + (i / NV) * ld + h + (i % NV) * W, a[i]);
  }

  // acc[g] += sum over t of p[g][t] * value t
  template <int RG>
  static TP_INLINE void accumulate(const float* p, const UnitRows& unit, int64_t dim, float* acc, int64_t ld,
                                   const UnitRows& next, int64_t next_bytes) {
    constexpr int NV = kValueVectors;
    const int64_t groups = dim / (NV * W);
    const int64_t slice = groups ? round_up(next_bytes / groups, 64) : next_bytes;
    int64_t h = 0;
    for (int64_t i = 0; i < groups; ++i, h += NV * W) {
      const int64_t begin = i * slice, end = begin + slice < next_bytes ? begin + slice : next_bytes;
      accumulate_columns<RG, NV>(p, unit, h, acc, ld, next, begin, end);
    }
    const UnitRows none;
    for (; h + W <= dim; h += W)
      accumulate_columns<RG, 1>(p, unit, h, acc, ld, groups ? none : next, 0, h ? 0 : next_bytes);
    if (h < dim) {
      for (int t = 0; t < unit.count; ++t) {
        const vf v = decode_partial<S>(unit.value[t] + h * size_of<S>(), (int)(dim - h));
        TP_UNROLL
        for (int g = 0; g < RG; ++g) storeu(acc + g * ld + h, loadu(acc + g * ld + h) + p[g * 64 + t] * v);
      }
    }
  }

  // Accumulator lanes [i, i + W) in their natural order.
  static TP_INLINE vf natural(const float* acc, int64_t i) { return loadu(acc + i); }
};

#if defined(__AVX512BF16__)
// Within 32 lanes, interleaving two rows by the 128-bit unpack instructions orders the sums 0-3 8-11 16-19 24-27 | 4-7
// 12-15 ...; accumulators keep that order until the output is written.
TP_INLINE vf natural_from_unpacked(const float* acc, int64_t i) {
  const vf lo = loadu(acc + i / 32 * 32), hi = loadu(acc + i / 32 * 32 + 16);
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  return _mm512_permutex2var_ps(lo, i % 32 ? second : first, hi);
}

TP_INLINE __mmask32 lanes_mask(int64_t n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0u : (1u << n) - 1; }

// p (64 floats) -> 32 pairs of bf16
TP_INLINE void pack_pairs(const float* p, int count, uint32_t* pairs) {
  for (int t = 0; t < count; t += 32)
    _mm512_storeu_si512(pairs + t / 2, (__m512i)_mm512_cvtne2ps_pbh(loadu(p + t + 16), loadu(p + t)));
}

// bf16 rows through vdpbf16ps, which multiplies pairs and accumulates in float32.
struct RowsDot {
  static constexpr DType kStorage = DType::bf16;
  static constexpr int kQueryPad = 32;
  using Query = uint16_t;

  static void load_query(DType, const void* source, int64_t dim, uint16_t* out) {
    __builtin_memcpy(out, source, 2 * dim);
    for (int64_t i = dim; i < round_up(dim, 32); ++i) out[i] = 0;
  }

  template <int RG, bool kPartial>
  static TP_INLINE void dot_step(const uint16_t* query, int64_t ld, const char* const* key, int64_t c, __mmask32 lanes,
                                 vf* acc) {
    constexpr int NK = keys_per_tile<RG>();
    __m512bh k[NK];
    TP_UNROLL
    for (int i = 0; i < NK; ++i)
      k[i] =
          (__m512bh)(kPartial ? _mm512_maskz_loadu_epi16(lanes, key[i] + 2 * c) : _mm512_loadu_si512(key[i] + 2 * c));
    TP_UNROLL
    for (int g = 0; g < RG; ++g) {
      const __m512bh q = (__m512bh)_mm512_loadu_si512(query + g * ld + c);
      TP_UNROLL
      for (int i = 0; i < NK; ++i) acc[g * NK + i] = _mm512_dpbf16_ps(acc[g * NK + i], q, k[i]);
    }
  }

  template <int RG>
  static TP_INLINE void logits(const uint16_t* query, int64_t ld, const UnitRows& unit, int64_t dim, float* s,
                               const UnitRows& next, int64_t next_bytes) {
    constexpr int NK = keys_per_tile<RG>();
    const int64_t whole = dim / 32 * 32;
    for (int t = 0; t < unit.count; t += NK) {
      vf acc[kReduce];
      TP_UNROLL
      for (int i = 0; i < kReduce; ++i) acc[i] = vf{};
      const int64_t ahead = t < next.count ? next_bytes : 0;
      for (int64_t c = 0; c < whole; c += 32) {
        prefetch_lines<NK>(next.key + t, c / 32 * 64, ahead);
        dot_step<RG, false>(query, ld, unit.key + t, c, 0, acc);
      }
      if (whole < dim) dot_step<RG, true>(query, ld, unit.key + t, whole, lanes_mask(dim - whole), acc);
      store_logits<RG, NK>(acc, s + t);
    }
  }

  // N = 1 or 2 chunks of 32 lanes
  template <int RG, int N, bool kPartial>
  static TP_INLINE void accumulate_columns(const uint32_t (*pairs)[32], const UnitRows& unit, int64_t h, int64_t dim,
                                           float* acc, int64_t ld, const UnitRows& next, int64_t next_begin,
                                           int64_t next_end) {
    vf a[RG * 2 * N];
    TP_UNROLL
    for (int i = 0; i < RG * 2 * N; ++i) a[i] = loadu(acc + (i / (2 * N)) * ld + h + (i % (2 * N)) * W);
    const __mmask32 lanes = lanes_mask(dim - h);
    for (int t = 0; t < unit.count; t += 2) {
      if (t < next.count) {
        prefetch_bytes(next.value[t], next_begin, next_end);
        prefetch_bytes(next.value[t + 1], next_begin, next_end);
      }
      __m512bh v[2 * N];
      TP_UNROLL
      for (int j = 0; j < N; ++j) {
        const char* x = unit.value[t] + 2 * (h + 32 * j);
        const char* y = unit.value[t + 1] + 2 * (h + 32 * j);
        const __m512i v0 = kPartial ? _mm512_maskz_loadu_epi16(lanes, x) : _mm512_loadu_si512(x);
        const __m512i v1 = kPartial ? _mm512_maskz_loadu_epi16(lanes, y) : _mm512_loadu_si512(y);
        v[2 * j] = (__m512bh)_mm512_unpacklo_epi16(v0, v1);
        v[2 * j + 1] = (__m512bh)_mm512_unpackhi_epi16(v0, v1);
      }
      TP_UNROLL
      for (int g = 0; g < RG; ++g) {
        const __m512bh p = (__m512bh)_mm512_set1_epi32((int)pairs[g][t / 2]);
        TP_UNROLL
        for (int j = 0; j < 2 * N; ++j) a[g * 2 * N + j] = _mm512_dpbf16_ps(a[g * 2 * N + j], p, v[j]);
      }
    }
    TP_UNROLL
    for (int i = 0; i < RG * 2 * N; ++i) storeu(acc + (i / (2 * N)) * ld + h + (i % (2 * N)) * W, a[i]);
  }

  template <int RG>
  static TP_INLINE void accumulate(const float* p, const UnitRows& unit, int64_t dim, float* acc, int64_t ld,
                                   const UnitRows& next, int64_t next_bytes) {
    alignas(64) uint32_t pairs[RG][32];
    TP_UNROLL
    for (int g = 0; g < RG; ++g) pack_pairs(p + g * 64, unit.count, pairs[g]);
    int64_t h = 0, done = 0;
    for (; h + 64 <= dim; h += 64) {
      const int64_t end = h + 128 <= dim ? round_up(next_bytes * (h + 64) / dim, 64) : next_bytes;
      accumulate_columns<RG, 2, false>(pairs, unit, h, dim, acc, ld, next, done, end);
      done = end;
    }
    if (h + 32 <= dim) {
      accumulate_columns<RG, 1, false>(pairs, unit, h, dim, acc, ld, next, done, next_bytes);
      h += 32;
      done = next_bytes;
    }
    if (h < dim) accumulate_columns<RG, 1, true>(pairs, unit, h, dim, acc, ld, next, done, next_bytes);
  }

  static TP_INLINE vf natural(const float* acc, int64_t i) { return natural_from_unpacked(acc, i); }
};
#endif

}  // namespace
}  // namespace torch_paged
