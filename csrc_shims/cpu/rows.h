// Products on a few query rows, keys and values used in place (decode, speculative tokens). A group of up to eight rows
// times a few keys is one register tile of dot products; the value product keeps as many rows x a few vectors of the
// output in registers.
//
// What is read comes from memory in two steps, both spread evenly through both products: the rows of a later unit are
// prefetched into L2, one line after the other, and those needed a few keys later from L2 into L1. Without the second
// step the loads wait behind the first one's misses.
#pragma once

#include "lanes.h"
#include "plan.h"

namespace torch_paged {
namespace {

constexpr int kMaxRowsAtOnce = W >= 8 ? 8 : 4;
constexpr int kKeysAhead = 8, kValuesAhead = 16;  // rows from a load back to its prefetch into L1
// Narrow vectors take few columns at a time: two rows share the work of a step and its prefetches.
constexpr int kValuesPerStep = W >= 16 ? 1 : 2;

// A number that a generic lambda can use as a template argument.
template <int N>
struct Count {
  static constexpr int value = N;
};

// Rows of a (key block, kv head) unit.
struct UnitRows {
  const char* key[64];
  const char* value[64];
  int count = 0;  // a multiple of 16

  UnitRows() {}  // the pointers stay unset: `count` says how many are
};

// The lines of some rows, prefetched into L2 a few at a time.
struct LinesAhead {
  const char* const* row;
  const char* const* end;
  int64_t row_bytes, offset = 0;

  LinesAhead(const char* const* rows, int count, int64_t row_bytes)
      : row(rows), end(rows + count), row_bytes(row_bytes) {}

  TP_INLINE void fetch(int lines) {
    for (int i = 0; i < lines && row != end; ++i) {
      prefetch_l2(*row + offset);
      offset += 64;
      if (offset >= row_bytes) {
        offset = 0;
        ++row;
      }
    }
  }
};

TP_INLINE int lines_of(int64_t bytes) { return (int)((bytes + 63) / 64); }

// Bytes [begin, begin + bytes) of N rows into L1.
template <int N>
TP_INLINE void fetch_rows(const char* const* rows, int64_t begin, int64_t bytes) {
  TP_UNROLL
  for (int i = 0; i < N; ++i)
    for (int64_t j = 0; j < bytes; j += 64) prefetch_l1(rows[i] + begin + j);
}

// Keys in a register tile of RG query rows, and vectors of the output.
template <int RG>
constexpr int keys_per_tile() {
  return RG == 1 ? kReduce : RG == 2 ? kReduce / 2 : RG <= 4 ? kReduce / 4 : kReduce / 8;
}
template <int RG>
constexpr int vectors_per_tile() {
  constexpr int kAccumulators = kReduce > 8 ? kReduce : 8;
  return kAccumulators / (RG <= 2 ? 2 : RG <= 4 ? 4 : 8);
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
  static constexpr int kMaxRows = kMaxRowsAtOnce, kRowsInPlace = kMaxRows;
  static constexpr int kStagedPad = 1;
  static constexpr bool kStages = is_quantized(S);
  using Query = float;

  static int64_t query_size(int64_t dim) { return round_up(dim, W); }

  static void arrange(char*, int64_t) {}

  static void load_query(DType dtype, const void* source, int64_t dim, float* out) {
    for (int64_t i = 0; i < dim; i += W) storeu(out + i, load_lanes(dtype, source, i, lanes_left(dim, i)));
  }

  // acc[g][i] += query row g . key i over lanes [c, c + W), or the first `partial` of them.
  template <int RG>
  static TP_INLINE void dot_step(const float* query, int64_t ld, const char* const* key, int64_t c, int partial,
                                 vf* acc) {
    constexpr int NK = keys_per_tile<RG>();
    vf k[NK];
    TP_UNROLL
    for (int i = 0; i < NK; ++i) {
      const char* from = key[i] + c * size_of<S>();
      k[i] = partial ? decode_partial<S>(from, partial) : decode<S>(from);
    }
    TP_UNROLL
    for (int g = 0; g < RG; ++g) {
      const vf q = loadu(query + g * ld + c);
      TP_UNROLL
      for (int i = 0; i < NK; ++i) acc[g * NK + i] += q * k[i];
    }
  }

  // s[g][t] = query row g . key t; query (RG, ld) padded with zeros to a multiple of W.
  template <int RG>
  static TP_INLINE void logits(const float* query, int64_t ld, const UnitRows& unit, int64_t dim, float* s,
                               const UnitRows& next, int64_t next_bytes) {
    constexpr int NK = keys_per_tile<RG>(), kLine = 64 / size_of<S>(), kAhead = NK > kKeysAhead ? NK : kKeysAhead;
    LinesAhead ahead(next.key, next.count, next_bytes);
    for (int t = 0; t < unit.count; t += NK) {
      vf acc[kReduce];
      TP_UNROLL
      for (int i = 0; i < kReduce; ++i) acc[i] = vf{};
      int64_t c = 0;
      for (; c + kLine <= dim; c += kLine) {
        ahead.fetch(NK);
        if (t + kAhead < unit.count) fetch_rows<NK>(unit.key + t + kAhead, c * size_of<S>(), 64);
        TP_UNROLL
        for (int i = 0; i < kLine; i += W) dot_step<RG>(query, ld, unit.key + t, c + i, 0, acc);
      }
      ahead.fetch(NK);
      for (; c + W <= dim; c += W) dot_step<RG>(query, ld, unit.key + t, c, 0, acc);
      if (c < dim) dot_step<RG>(query, ld, unit.key + t, c, (int)(dim - c), acc);
      store_logits<RG, NK>(acc, s + t);
    }
  }

  // Output lanes [h, h + NV * W), or the first `partial` of W.
  template <int RG, int NV>
  static TP_INLINE void accumulate_columns(const float* p, const UnitRows& unit, int64_t h, int partial, float* acc,
                                           int64_t ld, LinesAhead& ahead, int lines) {
    vf a[RG * NV];
    TP_UNROLL
    for (int i = 0; i < RG * NV; ++i) a[i] = loadu(acc + (i / NV) * ld + h + (i % NV) * W);
    constexpr int kBytes = NV * W * size_of<S>();
    const int64_t in_line = h * size_of<S>() % 64;
    const bool fetched = W < 16 && in_line != 0 && in_line + kBytes <= 64;  // with the columns before
    for (int t = 0; t < unit.count; t += kValuesPerStep) {
      ahead.fetch(lines);
      if (!fetched && t + kValuesAhead < unit.count)
        fetch_rows<kValuesPerStep>(unit.value + t + kValuesAhead, h * size_of<S>(), partial ? 1 : kBytes);
      TP_UNROLL
      for (int i = 0; i < kValuesPerStep; ++i) {
        vf v[NV];
        TP_UNROLL
        for (int j = 0; j < NV; ++j) {
          const char* from = unit.value[t + i] + (h + j * W) * size_of<S>();
          v[j] = partial ? decode_partial<S>(from, partial) : decode<S>(from);
        }
        TP_UNROLL
        for (int g = 0; g < RG; ++g) {
          const vf pg = set1(p[g * 64 + t + i]);
          TP_UNROLL
          for (int j = 0; j < NV; ++j) a[g * NV + j] += pg * v[j];
        }
      }
    }
    TP_UNROLL
    for (int i = 0; i < RG * NV; ++i) storeu(acc + (i / NV) * ld + h + (i % NV) * W, a[i]);
  }

  // The columns from h on, in groups of NV vectors as long as they fit.
  template <int RG, int NV>
  static TP_INLINE void accumulate_from(int64_t h, const float* p, const UnitRows& unit, int64_t dim, float* acc,
                                        int64_t ld, LinesAhead& ahead, int lines) {
    for (; h + NV * W <= dim; h += NV * W) accumulate_columns<RG, NV>(p, unit, h, 0, acc, ld, ahead, lines);
    if constexpr (NV > 1)
      accumulate_from<RG, NV / 2>(h, p, unit, dim, acc, ld, ahead, lines);
    else if (h < dim)
      accumulate_columns<RG, 1>(p, unit, h, (int)(dim - h), acc, ld, ahead, lines);
  }

  // acc[g] += sum over t of p[g][t] * value t
  template <int RG>
  static TP_INLINE void accumulate(const float* p, const UnitRows& unit, int64_t dim, float* acc, int64_t ld,
                                   const UnitRows& next, int64_t next_bytes) {
    // Half of the registers: more passes over the rows spread the prefetches of the next unit more evenly.
    constexpr int NV = W >= 16 && RG <= 4 ? vectors_per_tile<RG>() / 2 : vectors_per_tile<RG>();
    LinesAhead ahead(next.value, next.count, next_bytes);
    const int64_t groups = (dim + NV * W - 1) / (NV * W);
    const int64_t lines = kValuesPerStep * lines_of(next_bytes);
    accumulate_from<RG, NV>(0, p, unit, dim, acc, ld, ahead, (int)((lines + groups - 1) / groups));
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
  static constexpr int kMaxRows = kMaxRowsAtOnce;
  static constexpr bool kStages = false;
  using Query = uint16_t;

  static int64_t query_size(int64_t dim) { return round_up(dim, 32); }

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
    constexpr int NK = keys_per_tile<RG>(), kAhead = NK > kKeysAhead ? NK : kKeysAhead;
    const int64_t whole = dim / 32 * 32;
    LinesAhead ahead(next.key, next.count, next_bytes);
    for (int t = 0; t < unit.count; t += NK) {
      vf acc[kReduce];
      TP_UNROLL
      for (int i = 0; i < kReduce; ++i) acc[i] = vf{};
      for (int64_t c = 0; c < whole; c += 32) {
        ahead.fetch(NK);
        if (t + kAhead < unit.count) fetch_rows<NK>(unit.key + t + kAhead, 2 * c, 64);
        dot_step<RG, false>(query, ld, unit.key + t, c, 0, acc);
      }
      if (whole < dim) {
        ahead.fetch(NK);
        dot_step<RG, true>(query, ld, unit.key + t, whole, lanes_mask(dim - whole), acc);
      }
      store_logits<RG, NK>(acc, s + t);
    }
  }

  // N chunks of 32 lanes, the last one masked when they reach beyond dim.
  template <int RG, int N, bool kPartial>
  static TP_INLINE void accumulate_columns(const uint32_t (*pairs)[32], const UnitRows& unit, int64_t h, int64_t dim,
                                           float* acc, int64_t ld, LinesAhead& ahead, int lines) {
    vf a[RG * 2 * N];
    TP_UNROLL
    for (int i = 0; i < RG * 2 * N; ++i) a[i] = loadu(acc + (i / (2 * N)) * ld + h + (i % (2 * N)) * W);
    const __mmask32 lanes = lanes_mask(dim - h);
    for (int t = 0; t < unit.count; t += 2) {
      ahead.fetch(lines);
      if (t + kValuesAhead < unit.count) fetch_rows<2>(unit.value + t + kValuesAhead, 2 * h, kPartial ? 1 : 64 * N);
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

  template <int RG, int N>
  static TP_INLINE void accumulate_from(int64_t h, const uint32_t (*pairs)[32], const UnitRows& unit, int64_t dim,
                                        float* acc, int64_t ld, LinesAhead& ahead, int lines) {
    for (; h + 32 * N <= dim; h += 32 * N) accumulate_columns<RG, N, false>(pairs, unit, h, dim, acc, ld, ahead, lines);
    if constexpr (N > 1)
      accumulate_from<RG, N / 2>(h, pairs, unit, dim, acc, ld, ahead, lines);
    else if (h < dim)
      accumulate_columns<RG, 1, true>(pairs, unit, h, dim, acc, ld, ahead, lines);
  }

  template <int RG>
  static TP_INLINE void accumulate(const float* p, const UnitRows& unit, int64_t dim, float* acc, int64_t ld,
                                   const UnitRows& next, int64_t next_bytes) {
    constexpr int N = vectors_per_tile<RG>() / 2;
    alignas(64) uint32_t pairs[RG][32];
    TP_UNROLL
    for (int g = 0; g < RG; ++g) pack_pairs(p + g * 64, unit.count, pairs[g]);
    LinesAhead ahead(next.value, next.count, next_bytes);
    const int64_t groups = (dim + 32 * N - 1) / (32 * N);
    accumulate_from<RG, N>(0, pairs, unit, dim, acc, ld, ahead,
                           (int)((2 * lines_of(next_bytes) + groups - 1) / groups));
  }

  static TP_INLINE vf natural(const float* acc, int64_t i) { return natural_from_unpacked(acc, i); }
};
#endif

}  // namespace
}  // namespace torch_paged
