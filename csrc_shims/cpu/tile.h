// Products on a tile of many query rows (prefill): 64 keys and values are packed once and used by all rows of the tile.
// Keys are transposed, so that a register tile of kTileRowsAtOnce rows x kTileVectors vectors of keys needs one
// broadcast per row and step; values are laid out row by row (float32) or as interleaved pairs of rows (bf16).
#pragma once

#include "rows.h"

namespace torch_paged {
namespace {

constexpr int kTileRowsAtOnce = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

#if defined(__AVX512F__)
// Transpose 16 x 16 words in registers.
TP_INLINE void transpose16(__m512i* v) {
  __m512i t[16];
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
}
#endif

// rows[64] of `words` 32-bit words (readable up to a multiple of 16) -> out[word][row]
TP_INLINE void transpose_rows(const char* const* rows, int64_t words, uint32_t* out) {
#if defined(__AVX512F__)
  for (int r = 0; r < 64; r += 16)
    for (int64_t w = 0; w < words; w += 16) {
      __m512i v[16];
      TP_UNROLL
      for (int i = 0; i < 16; ++i) v[i] = _mm512_loadu_si512(rows[r + i] + 4 * w);
      transpose16(v);
      TP_UNROLL
      for (int i = 0; i < 16; ++i) _mm512_storeu_si512(out + (w + i) * 64 + r, v[i]);
    }
#else
  for (int r = 0; r < 64; r += 8)
    for (int64_t w = 0; w < words; ++w)
      for (int i = 0; i < 8; ++i) __builtin_memcpy(out + w * 64 + r + i, rows[r + i] + 4 * w, 4);
#endif
}

struct TileF32 {
  using Direct = RowsF32<DType::f32>;  // with the same order of the accumulator's lanes
  static constexpr DType kStorage = DType::f32;
  static constexpr int kQueryPad = W;
  static constexpr int kLanesPerWord = 1;
  using Query = float;

  static void load_query(DType dtype, const void* source, int64_t dim, float* out) {
    RowsF32<DType::f32>::load_query(dtype, source, dim, out);
  }

  static TP_INLINE void pack_values(const char* const* rows, int64_t dim, uint32_t* out) {
    for (int t = 0; t < 64; ++t)
      for (int64_t h = 0; h < dim; h += W) storeu((float*)out + t * dim + h, loadu((const float*)rows[t] + h));
  }

  // s (6, 64) = query (6, ld) . keys. Sums of at most kChain products are added up: the rounding error of one long
  // chain would grow with head_dim.
  static TP_INLINE void logits(const float* query, int64_t ld, const uint32_t* keys, int64_t words, int count,
                               float* s) {
    constexpr int MR = kTileRowsAtOnce, NV = kTileVectors;
    constexpr int64_t kChain = 128;
    for (int col = 0; col < count; col += NV * W) {
      for (int64_t begin = 0; begin < words; begin += kChain) {
        const int64_t end = begin + kChain < words ? begin + kChain : words;
        vf c[MR * NV];
        TP_UNROLL
        for (int i = 0; i < MR * NV; ++i) c[i] = vf{};
        for (int64_t k = begin; k < end; ++k) {
          vf b[NV];
          TP_UNROLL
          for (int j = 0; j < NV; ++j) b[j] = loadu((const float*)keys + k * 64 + col + j * W);
          TP_UNROLL
          for (int m = 0; m < MR; ++m) {
            const vf a = set1(query[m * ld + k]);
            TP_UNROLL
            for (int j = 0; j < NV; ++j) c[m * NV + j] += a * b[j];
          }
        }
        TP_UNROLL
        for (int i = 0; i < MR * NV; ++i) {
          float* to = s + (i / NV) * 64 + col + (i % NV) * W;
          storeu(to, begin == 0 ? c[i] : loadu(to) + c[i]);
        }
      }
    }
  }

  // acc (6, dim) += p (6, 64) . values (64, dim)
  static TP_INLINE void accumulate(const float* p, const uint32_t* values, int count, int64_t dim, float* acc) {
    constexpr int MR = kTileRowsAtOnce, NV = kTileVectors;
    for (int64_t h = 0; h < dim; h += NV * W) {
      vf c[MR * NV];
      TP_UNROLL
      for (int i = 0; i < MR * NV; ++i) c[i] = loadu(acc + (i / NV) * dim + h + (i % NV) * W);
      for (int t = 0; t < count; ++t) {
        vf b[NV];
        TP_UNROLL
        for (int j = 0; j < NV; ++j) b[j] = loadu((const float*)values + t * dim + h + j * W);
        TP_UNROLL
        for (int m = 0; m < MR; ++m) {
          const vf a = set1(p[m * 64 + t]);
          TP_UNROLL
          for (int j = 0; j < NV; ++j) c[m * NV + j] += a * b[j];
        }
      }
      TP_UNROLL
      for (int i = 0; i < MR * NV; ++i) storeu(acc + (i / NV) * dim + h + (i % NV) * W, c[i]);
    }
  }

  static TP_INLINE vf natural(const float* acc, int64_t i) { return loadu(acc + i); }
};

#if defined(__AVX512BF16__)
struct TileDot {
  using Direct = RowsDot;
  static constexpr DType kStorage = DType::bf16;
  static constexpr int kQueryPad = 32;
  static constexpr int kLanesPerWord = 2;
  using Query = uint16_t;

  static void load_query(DType dtype, const void* source, int64_t dim, uint16_t* out) {
    RowsDot::load_query(dtype, source, dim, out);
  }

  static TP_INLINE void pack_values(const char* const* rows, int64_t dim, uint32_t* out) {
    for (int t = 0; t < 64; t += 2)
      for (int64_t h = 0; h < dim; h += 32) {
        const __m512i a = _mm512_loadu_si512(rows[t] + 2 * h), b = _mm512_loadu_si512(rows[t + 1] + 2 * h);
        uint32_t* to = out + t / 2 * dim + h;
        _mm512_storeu_si512(to, _mm512_unpacklo_epi16(a, b));
        _mm512_storeu_si512(to + 16, _mm512_unpackhi_epi16(a, b));
      }
  }

  static TP_INLINE void logits(const uint16_t* query, int64_t ld, const uint32_t* keys, int64_t words, int, float* s) {
    constexpr int MR = kTileRowsAtOnce, NV = kTileVectors;
    vf c[MR * NV];
    TP_UNROLL
    for (int i = 0; i < MR * NV; ++i) c[i] = vf{};
    for (int64_t k = 0; k < words; ++k) {
      __m512bh b[NV];
      TP_UNROLL
      for (int j = 0; j < NV; ++j) b[j] = (__m512bh)_mm512_loadu_si512(keys + k * 64 + j * W);
      TP_UNROLL
      for (int m = 0; m < MR; ++m) {
        const __m512bh a = (__m512bh)_mm512_set1_epi32(load_bits<int32_t>(query + m * ld + 2 * k));
        TP_UNROLL
        for (int j = 0; j < NV; ++j) c[m * NV + j] = _mm512_dpbf16_ps(c[m * NV + j], a, b[j]);
      }
    }
    TP_UNROLL
    for (int i = 0; i < MR * NV; ++i) storeu(s + i * W, c[i]);
  }

  static TP_INLINE void accumulate(const float* p, const uint32_t* values, int count, int64_t dim, float* acc) {
    constexpr int MR = kTileRowsAtOnce, NV = kTileVectors;
    alignas(64) uint32_t pairs[MR][32];
    TP_UNROLL
    for (int m = 0; m < MR; ++m) pack_pairs(p + m * 64, count, pairs[m]);
    for (int64_t h = 0; h < dim; h += NV * W) {
      vf c[MR * NV];
      TP_UNROLL
      for (int i = 0; i < MR * NV; ++i) c[i] = loadu(acc + (i / NV) * dim + h + (i % NV) * W);
      for (int t = 0; t < count / 2; ++t) {
        __m512bh b[NV];
        TP_UNROLL
        for (int j = 0; j < NV; ++j) b[j] = (__m512bh)_mm512_loadu_si512(values + t * dim + h + j * W);
        TP_UNROLL
        for (int m = 0; m < MR; ++m) {
          const __m512bh a = (__m512bh)_mm512_set1_epi32((int)pairs[m][t]);
          TP_UNROLL
          for (int j = 0; j < NV; ++j) c[m * NV + j] = _mm512_dpbf16_ps(c[m * NV + j], a, b[j]);
        }
      }
      TP_UNROLL
      for (int i = 0; i < MR * NV; ++i) storeu(acc + (i / NV) * dim + h + (i % NV) * W, c[i]);
    }
  }

  static TP_INLINE vf natural(const float* acc, int64_t i) { return natural_from_unpacked(acc, i); }
};
#endif

}  // namespace
}  // namespace torch_paged
