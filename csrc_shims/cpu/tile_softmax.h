// Online softmax of a tile's logits, a few rows at a time.
#pragma once

#include "softmax.h"
#include "tile.h"

namespace torch_paged {
namespace {

// The largest lane of each of MR <= 8 vectors, in the first lanes of vectors of W.
template <int MR>
TP_INLINE void largest_lanes(const vf* x, vf* largest) {
#if defined(__AVX512F__)
  __m512 b[4], c[2];
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const vf y = x[2 * i < MR ? 2 * i : 0], z = x[2 * i < MR ? 2 * i + 1 : 1];
    b[i] = vmax(_mm512_unpacklo_ps(y, z), _mm512_unpackhi_ps(y, z));
  }
  TP_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m512d y = _mm512_castps_pd(b[2 * i]), z = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = vmax((vf)_mm512_unpacklo_pd(y, z), (vf)_mm512_unpackhi_pd(y, z));
  }
  const vf d = vmax(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  const vf e = vmax(d, _mm512_shuffle_f32x4(d, d, 0xb1));
  largest[0] = _mm512_shuffle_f32x4(e, e, 0x08);
#else
  TP_UNROLL
  for (int m = 0; m < MR; ++m) largest[m / W][m % W] = hmax(x[m]);
#endif
}

// Logits (MR, 64) become probabilities: exp of factor * logit less the running maximum, which moves on first; the
// factors by which that shrinks earlier sums are left in `shrink`. top: largest logits of each lane. A row's sum is
// kept in W lanes.
template <class Kernel, int MR, bool kAll>
TP_INLINE void exponentiate(float* s, const vf* top, float factor, const float* value_scale, const uint64_t* bits,
                            int begin, int end, bool first, float* max, float* shrink, float* sum, uint32_t* p) {
  constexpr int kVectors = (MR + W - 1) / W;
  alignas(64) float base[kVectors * W];
  vf largest[kVectors];
  largest_lanes<MR>(top, largest);
  vf size = vf{};
  TP_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const vf old = loadu(max + i * W);
    const vf larger = vmax(largest[i], old);  // the old one where the new one is NaN
    const vf now = select_bits((uint32_t)(low_bits(MR) >> i * W), larger, old);
    const vf finite = now == kNegInf ? vf{} : now;
    size = vmax(size, select_bits((uint32_t)(low_bits(MR) >> i * W), vabs(finite), vf{}));
    storeu(max + i * W, now);
    storeu(base + i * W, finite);
    storeu(shrink + i * W, vexp(old - finite));  // exactly 1 where the maximum stays
  }
  if (factor != 1.0f && any_above(size, kLargeLogit)) {
    for (int m = 0; m < MR; ++m)
      scale_products(s + m * 64 + begin, end - begin, factor, __builtin_fabsf(base[m]) > kLargeLogit, base + m);
    factor = 1.0f;
  }
  vf total[MR];
  TP_UNROLL
  for (int m = 0; m < MR; ++m) total[m] = first ? vf{} : loadu(sum + m * W) * shrink[m];
  TP_UNROLL
  for (int i = begin; i < end; i += W) {
    TP_UNROLL
    for (int m = 0; m < MR; ++m) {
      const vf x = loadu(s + m * 64 + i) * factor - base[m];
      vf e = vexp<Kernel::kLanesPerWord == 1>(kAll ? x : select_bits((uint32_t)(bits[m] >> i), x, set1(kNegInf)));
      total[m] = total[m] + e;
      if (value_scale) e = select_bits((uint32_t)(bits[m] >> i), e * loadu(value_scale + i), vf{});
      Kernel::put_probabilities(p + m * (64 / Kernel::kLanesPerWord), i, e);
    }
  }
  TP_UNROLL
  for (int m = 0; m < MR; ++m) storeu(sum + m * W, total[m]);
}

// Logits that are products times a scale > 0 and nothing more.
template <class Kernel, int MR, bool kAll>
TP_INLINE void plain_softmax(float scale, const uint64_t* bits, int begin, int end, bool first, float* s, float* max,
                             float* shrink, float* sum, uint32_t* p) {
  vf top[MR];
  TP_UNROLL
  for (int m = 0; m < MR; ++m) top[m] = set1(kNegInf);
  TP_UNROLL
  for (int i = begin; i < end; i += W) {
    TP_UNROLL
    for (int m = 0; m < MR; ++m) {
      const vf x = loadu(s + m * 64 + i);
      top[m] = vmax(kAll ? x : select_bits((uint32_t)(bits[m] >> i), x, set1(kNegInf)), top[m]);
    }
  }
  TP_UNROLL
  for (int m = 0; m < MR; ++m) top[m] = top[m] * scale;
  exponentiate<Kernel, MR, kAll>(s, top, scale, nullptr, bits, begin, end, first, max, shrink, sum, p);
}

}  // namespace
}  // namespace torch_paged
