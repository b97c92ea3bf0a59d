// From dot products to an output row: logits, online softmax, what NaN may reach, the division at the end.
#pragma once

#include "keys.h"

namespace torch_paged {
namespace {

// What turns a dot product into a logit.
struct LogitRule {
  float scale, cap;
  const float* key_scale = nullptr;  // one per key of the block, null for an unquantised cache
  const float* value_scale = nullptr;
};

// What the softmax of a few rows needs to know about one of them.
struct RowSight {
  uint64_t bits;     // the keys of the block that it sees
  int64_t distance;  // from the block's first key to the query
  float slope;       // ALiBi
};

// Logits of one row, stored to s; returns their maximum a lane.
TP_INLINE vf masked_logits(const LogitRule& rule, const RowSight& row, int count, float* s) {
  const vf lanes = __builtin_convertvector(lane_index(), vf);
  vf top = set1(kNegInf);
  for (int i = 0; i < count; i += W) {
    vf x = loadu(s + i) * rule.scale;
    if (rule.key_scale) x = x * loadu(rule.key_scale + i);
    if (rule.cap != 0.0f) x = rule.cap * vtanh(x / rule.cap);
    if (row.slope != 0.0f) x = x - row.slope * vabs((float)(row.distance - i) - lanes);
    x = select_bits((uint32_t)(row.bits >> i), x, set1(kNegInf));
    top = vmax(top, x);
    storeu(s + i, x);
  }
  return top;
}

// With FMA a product times the scale less the maximum is rounded once, and the largest key is not at 0: the maximum was
// rounded before. From here on that could leave the range of exp, so products become logits first.
constexpr float kLargeLogit = 0x1p20f;

// Products of a row become logits where its own are large; else, beside such rows, logits less the maximum: the same
// bits as without them.
__attribute__((noinline, cold)) void scale_products(float* s, int count, float scale, bool large, float* base) {
  const float less = large ? 0.0f : *base;
  for (int i = 0; i < count; i += W) storeu(s + i, loadu(s + i) * scale - less);
  if (!large) *base = 0.0f;
}

// Logits of RG rows and a block become probabilities, and each row's running max, sum and accumulator move to the new
// max. The sum is a vector per row, whose lanes are added up at the end. The usual case, nothing but a scale and all
// keys visible, needs one pass to find the maximum.
template <int RG>
TP_INLINE void softmax_rows(const LogitRule& rule, const RowSight* rows, int count, float* s, float* max, float* sum,
                            float* acc, int64_t acc_lanes) {
  bool plain = !rule.key_scale && rule.cap == 0.0f && rule.scale > 0.0f;
  TP_UNROLL
  for (int g = 0; g < RG; ++g) plain = plain && rows[g].bits == low_bits(count) && rows[g].slope == 0.0f;
  vf top[RG];
  if (plain) {
    TP_UNROLL
    for (int g = 0; g < RG; ++g) {
      top[g] = loadu(s + g * 64);
      for (int i = W; i < count; i += W) top[g] = vmax(top[g], loadu(s + g * 64 + i));
      top[g] = top[g] * rule.scale;
    }
  } else {
    for (int g = 0; g < RG; ++g) top[g] = masked_logits(rule, rows[g], count, s + g * 64);
  }
  float block_max[RG];
  TP_UNROLL
  for (int g = 0; g < RG; ++g) block_max[g] = hmax(top[g]);
  float factor = plain ? rule.scale : 1.0f, base[RG];
  bool large = false;
  TP_UNROLL
  for (int g = 0; g < RG; ++g) {
    const float now = block_max[g] > max[g] ? block_max[g] : max[g];
    base[g] = now == kNegInf ? 0.0f : now;
    large |= plain && __builtin_fabsf(block_max[g]) > kLargeLogit;
  }
  if (__builtin_expect(large, false)) {
    for (int g = 0; g < RG; ++g)
      scale_products(s + g * 64, count, factor, __builtin_fabsf(block_max[g]) > kLargeLogit, base + g);
    factor = 1.0f;
  }
  for (int g = 0; g < RG; ++g) {
    if (block_max[g] > max[g]) {
      if (max[g] != kNegInf) {
        const vf shrink = vexp(set1(max[g] - block_max[g]));
        storeu(sum + g * W, loadu(sum + g * W) * shrink);
        for (int64_t i = 0; i < acc_lanes; i += W)
          storeu(acc + g * acc_lanes + i, loadu(acc + g * acc_lanes + i) * shrink);
      }
      max[g] = block_max[g];
    }
    vf total = loadu(sum + g * W);
    for (int i = 0; i < count; i += W) {
      vf p = vexp(loadu(s + g * 64 + i) * factor - base[g]);
      total = total + p;
      if (rule.value_scale) p = select_bits((uint32_t)(rows[g].bits >> i), p * loadu(rule.value_scale + i), vf{});
      storeu(s + g * 64 + i, p);
    }
    storeu(sum + g * W, total);
  }
}

template <DType S>
TP_INLINE vf times_zero(const char* row, int64_t dim) {  // NaN where a lane is infinite or NaN
  vf zero = vf{};
  int64_t i = 0;
  for (; i + W <= dim; i += W) zero = zero + decode<S>(row + i * size_of<S>()) * 0.0f;
  if (i < dim) zero = zero + decode_partial<S>(row + i * size_of<S>(), (int)(dim - i)) * 0.0f;
  return zero;
}

template <DType S>
TP_INLINE bool is_finite(const char* row, int64_t dim) {
  return hsum(times_zero<S>(row, dim)) == 0.0f;
}

// 0 * NaN is NaN: a value that some rows see and others do not must be finite, to be multiplied by the zero probability
// of the others. Values that are not are taken out of the unit, and added to the rows that see them one by one.
struct Poisoned {
  uint64_t keys = 0;
  UnitRows rows;
  const char* zeros;

  explicit Poisoned(const char* zeros) : zeros(zeros) {}

  template <DType S>
  TP_INLINE void take(uint64_t seen_by_some, uint64_t seen_by_all, int64_t dim, UnitRows& unit) {
    keys = 0;
    const uint64_t mixed = seen_by_some & ~seen_by_all;
    if (!mixed) return;
    vf zero = vf{};
    for (uint64_t left = mixed; left; left &= left - 1)
      zero = zero + times_zero<S>(unit.value[__builtin_ctzll(left)], dim);
    if (hsum(zero) == 0.0f) return;
    for (uint64_t left = mixed; left; left &= left - 1) {
      const int i = __builtin_ctzll(left);
      if (is_finite<S>(unit.value[i], dim)) continue;
      keys |= 1ull << i;
      rows.value[i] = unit.value[i];
      unit.value[i] = zeros;
    }
  }

  template <class Direct>
  TP_INLINE void add(uint64_t bits, int count, const float* p, int64_t dim, float* acc, int64_t ld) const {
    if ((keys & bits) == 0) return;
    UnitRows seen, none;
    seen.count = count;
    for (int i = 0; i < count; ++i) seen.value[i] = (keys & bits) >> i & 1 ? rows.value[i] : zeros;
    Direct::template accumulate<1>(p, seen, dim, acc, ld, none, 0);
  }
};

// Lanes [i, i + W) of an output row.
template <DType S>
TP_INLINE void put_vector(char* row, int64_t i, vf x) {
#if defined(__AVX512BF16__)
  if constexpr (S == DType::bf16) {
    _mm256_storeu_si256((__m256i*)(row + 2 * i), (__m256i)_mm512_cvtneps_pbh(x));
    return;
  }
#endif
  encode<S>(row + i * size_of<S>(), x);
}

TP_INLINE void put_vector(DType dtype, char* row, int64_t i, vf x) {
  if (dtype == DType::f32)
    put_vector<DType::f32>(row, i, x);
  else if (dtype == DType::bf16)
    put_vector<DType::bf16>(row, i, x);
  else
    put_vector<DType::f16>(row, i, x);
}

// A row of the accumulator, divided by its sum, in the output's type.
template <class Kernel, DType S>
TP_INLINE void put_row(const float* acc, float factor, int64_t dim, char* out) {
  int64_t i = 0;
  for (; i + W <= dim; i += W) put_vector<S>(out, i, Kernel::natural(acc, i) * factor);
  if (i < dim) encode_partial<S>(out + i * size_of<S>(), Kernel::natural(acc, i) * factor, (int)(dim - i));
}

// Writes the statistics of a row; returns the factor that makes its accumulator the output.
TP_INLINE float finish_row(const AttentionArgs& args, int64_t token, int64_t head, float max, float sum) {
  const float sink = args.sinks ? args.sinks[head] : kNegInf;
  const int64_t row = token * args.num_heads + head;
  float factor = 0.0f, lse = sink;
  if (max != kNegInf || sum != 0.0f) {  // sum != 0 with no max: NaN, which stays visible
    const float top = max > sink ? max : sink;
    const float base = top == kNegInf ? 0.0f : top;
    const float shrink = max == top ? 1.0f : __builtin_expf(max - base);
    const float total = sum * shrink + (args.sinks ? __builtin_expf(sink - base) : 0.0f);
    factor = shrink / total;
    if (args.lse) lse = base + __builtin_logf(total);
  }
  if (args.lse) args.lse[row] = lse;
  if (args.max_logits) args.max_logits[row] = max;
  return factor;
}

template <class Kernel>
void write_row(const AttentionArgs& args, int64_t token, int64_t head, float max, float sum, const float* acc) {
  const float factor = finish_row(args, token, head, max, sum);
  const int64_t row_bytes = args.value_dim * element_size(args.dtype);
  char* out = (char*)args.out + (token * args.num_heads + head) * row_bytes;
  if (factor == 0.0f)
    __builtin_memset(out, 0, row_bytes);
  else if (args.dtype == DType::f32)
    put_row<Kernel, DType::f32>(acc, factor, args.value_dim, out);
  else if (args.dtype == DType::bf16)
    put_row<Kernel, DType::bf16>(acc, factor, args.value_dim, out);
  else
    put_row<Kernel, DType::f16>(acc, factor, args.value_dim, out);
}

// Rows of one kv head leave the item: to the output, or to the partial buffers.
template <class Kernel>
void write_rows(const AttentionArgs& args, const Sequence& seq, const Item& item, int64_t head,
                const Partials& partials, const float* max, const float* sum, const float* acc) {
  const int64_t group = args.num_heads / args.num_kv_heads, rows = item.num_tokens * group, lanes = acc_dim(args);
  if (item.partial < 0) {
    for (int64_t r = 0; r < rows; ++r)
      write_row<Kernel>(args, seq.query_begin + item.token_begin + r / group, head * group + r % group, max[r], sum[r],
                        acc + r * lanes);
    return;
  }
  const int64_t to = item.partial + head * rows;
  for (int64_t i = 0; i < rows * lanes; i += W) storeu(partials.acc + to * lanes + i, Kernel::natural(acc, i));
  __builtin_memcpy(partials.max + to, max, rows * sizeof(float));
  __builtin_memcpy(partials.sum + to, sum, rows * sizeof(float));
}

}  // namespace
}  // namespace torch_paged
