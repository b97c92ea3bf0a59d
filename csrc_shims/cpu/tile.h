// Products on a tile of many query rows (prefill). Both are the same loop: a register tile of MR rows x NV vectors, one
// broadcast word per row and one packed vector per column and step.
#pragma once

#include "softmax.h"
#include "tile_pack.h"

namespace torch_paged {
namespace {

constexpr int kTileRowsAtOnce = 6;
#if defined(__AVX512F__)
constexpr int kTileVectors = 4;
#else
constexpr int kTileVectors = 2;
#endif

// c (MR, NV vectors) += a (MR rows of words) . b (steps, NV vectors)
template <class Kernel, int MR, int NV>
TP_INLINE void multiply(const char* const* a, const uint32_t* b, int64_t ldb, int64_t begin, int64_t end, vf* c) {
  for (int64_t k = begin; k < end; ++k) {
    vf v[NV];
    TP_UNROLL
    for (int j = 0; j < NV; ++j) v[j] = loadu((const float*)b + k * ldb + j * W);
    TP_UNROLL
    for (int m = 0; m < MR; ++m) {
      TP_UNROLL
      for (int j = 0; j < NV; ++j) c[m * NV + j] = Kernel::step(c[m * NV + j], a[m] + 4 * k, v[j]);
    }
  }
}

// s (MR, 64) = query (MR rows) . keys, in NV vectors of columns. Sums of at most kChain words are added up: the
// rounding error of one long chain would grow with head_dim.
template <class Kernel, int MR, int NV>
TP_INLINE void logit_columns(const char* const* query, const uint32_t* keys, int64_t words, float* s) {
  constexpr int64_t kChain = 128;
  for (int64_t begin = 0; begin < words; begin += kChain) {
    vf c[MR * NV];
    TP_UNROLL
    for (int i = 0; i < MR * NV; ++i) c[i] = vf{};
    multiply<Kernel, MR, NV>(query, keys, 64, begin, begin + kChain < words ? begin + kChain : words, c);
    TP_UNROLL
    for (int i = 0; i < MR * NV; ++i) {
      float* to = s + (i / NV) * 64 + (i % NV) * W;
      storeu(to, begin == 0 ? c[i] : loadu(to) + c[i]);
    }
  }
}

// Columns [begin, end), multiples of 16. Not inlined: the loops need most registers for themselves.
template <class Kernel, int MR>
__attribute__((noinline)) void logits(const char* const* query, const uint32_t* keys, int64_t words, int begin, int end,
                                      float* s) {
  constexpr int NV = kTileVectors;
  for (; begin + NV * W <= end; begin += NV * W) logit_columns<Kernel, MR, NV>(query, keys + begin, words, s + begin);
  if constexpr (NV > 2) {
    if (begin + 3 * W == end) return logit_columns<Kernel, MR, 3>(query, keys + begin, words, s + begin);
    for (; begin + 2 * W <= end; begin += 2 * W) logit_columns<Kernel, MR, 2>(query, keys + begin, words, s + begin);
  }
  if constexpr (NV * W > 16)
    for (; begin < end; begin += W) logit_columns<Kernel, MR, 1>(query, keys + begin, words, s + begin);
}

// Where the sums of values go: back to the accumulator, or, divided, to the output.
struct ToAccumulator {
  float* acc;
  int64_t ld;

  template <int NV>
  TP_INLINE void put(int m, int64_t h, const vf* c) const {
    TP_UNROLL
    for (int j = 0; j < NV; ++j) storeu(acc + m * ld + h + j * W, c[j]);
  }
};

struct ToOutput {
  DType dtype;
  int64_t dim;
  char* const* rows;
  const float* factor;

  template <int NV>
  TP_INLINE void put(int m, int64_t h, const vf* c) const {
    vf x[NV];
    TP_UNROLL
    for (int j = 0; j < NV; ++j) x[j] = factor[m] == 0.0f ? vf{} : c[j] * factor[m];
    if (h + NV * W <= dim) {
      TP_UNROLL
      for (int j = 0; j < NV; ++j) put_vector(dtype, rows[m], h + j * W, x[j]);
      return;
    }
    for (int j = 0; j < NV && h < dim; ++j, h += W) store_lanes(dtype, rows[m], h, x[j], lanes_left(dim, h));
  }
};

template <class Kernel, int MR, int NV, class To>
TP_INLINE void accumulate_columns(const char* const* p, const uint32_t* values, int64_t ld, int begin, int end,
                                  const float* shrink, const float* acc, int64_t h, const To& to) {
  vf c[MR * NV];
  if (acc) {
    TP_UNROLL
    for (int i = 0; i < MR * NV; ++i) c[i] = loadu(acc + (i / NV) * ld + h + (i % NV) * W) * shrink[i / NV];
  } else {
    TP_UNROLL
    for (int i = 0; i < MR * NV; ++i) c[i] = vf{};
  }
  multiply<Kernel, MR, NV>(p, values + h, ld, begin, end, c);
  TP_UNROLL
  for (int m = 0; m < MR; ++m) to.template put<NV>(m, h, c + m * NV);
}

// to = acc * shrink + p . values of the keys [begin, end), for MR rows; 0 instead of a null acc.
template <class Kernel, int MR, class To>
__attribute__((noinline)) void accumulate(const char* const* p, const uint32_t* values, int64_t ld, int begin, int end,
                                          int64_t dim, const float* shrink, const float* acc, const To& to) {
  constexpr int NV = kTileVectors;
  begin /= Kernel::kLanesPerWord;
  end = (end + Kernel::kLanesPerWord - 1) / Kernel::kLanesPerWord;
  int64_t h = 0;
  for (; h + NV * W <= dim; h += NV * W)
    accumulate_columns<Kernel, MR, NV>(p, values, ld, begin, end, shrink, acc, h, to);
  if constexpr (NV > 2)
    for (; h + 2 * W <= dim; h += 2 * W)
      accumulate_columns<Kernel, MR, 2>(p, values, ld, begin, end, shrink, acc, h, to);
  for (; h < dim; h += W) accumulate_columns<Kernel, MR, 1>(p, values, ld, begin, end, shrink, acc, h, to);
}

}  // namespace
}  // namespace torch_paged
