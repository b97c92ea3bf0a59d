// Kernels on single rows: dequantise, quantise, find the scale, merge partial attention states.
#pragma once

#include "attention_kernel.h"

namespace torch_paged {
namespace {

// float32 in [-largest, largest] -> the low byte of each lane, round to nearest even.
template <DType S>
TP_INLINE vu quantized_bits(vf x) {
  if constexpr (S == DType::i8) {
    const vf magic = set1(12582912.0f);
    return (vu)(x + magic) - (vu)magic;
  }
  constexpr int kMantissa = S == DType::e4m3 ? 3 : 2, kDrop = 23 - kMantissa, kBias = S == DType::e4m3 ? 120 : 112;
  // The unit of the subnormals is 2^-9 (e4m3) or 2^-16 (e5m2); adding unit * 2^23 rounds to whole units.
  const vf magic = set1(S == DType::e4m3 ? 16384.0f : 128.0f);
  const vf a = vabs(x);
  const vu u = (vu)a;
  const vu normal = ((u + ((1u << (kDrop - 1)) - 1) + ((u >> kDrop) & 1u)) >> kDrop) - (kBias << kMantissa);
  const vu subnormal = (vu)(a + magic) - (vu)magic;
  const vu bits = u < (vu{} + ((kBias + 1u) << 23)) ? subnormal : normal;
  const vu number = x != x ? vu{} + 0x7fu : bits;
  return number | (((vu)x >> 24) & 0x80u);
}

template <DType S>
TP_INLINE void quantize_lanes(vf x, float scale, uint8_t* out, int n) {
  const vf q = x / scale;
  const vf top = set1(largest(S)), bottom = set1(-largest(S));
  const vf above = q > top ? top : q;
  const vu8 bytes = __builtin_convertvector(quantized_bits<S>(above < bottom ? bottom : above), vu8);
  if (n == W)
    __builtin_memcpy(out, &bytes, W);
  else
    for (int i = 0; i < n; ++i) out[i] = bytes[i];
}

void decode_row(DType dtype, const void* source, float scale, float* out, int64_t dim) {
  for (int64_t i = 0; i < dim; i += W) {
    const int n = lanes_left(dim, i);
    store_lanes(DType::f32, out, i, load_lanes(dtype, source, i, n) * scale, n);
  }
}

template <DType From, DType To>
void quantize_lanes_of_row(const void* source, float scale, void* out, int64_t dim) {
  int64_t i = 0;
  for (; i + W <= dim; i += W)
    quantize_lanes<To>(decode<From>((const char*)source + i * size_of<From>()), scale, (uint8_t*)out + i, W);
  if (i < dim) {
    const int n = (int)(dim - i);
    quantize_lanes<To>(decode_partial<From>((const char*)source + i * size_of<From>(), n), scale, (uint8_t*)out + i, n);
  }
}

template <DType From>
void quantize_row_of(const void* source, float scale, DType dtype, void* out, int64_t dim) {
  if (dtype == DType::i8)
    quantize_lanes_of_row<From, DType::i8>(source, scale, out, dim);
  else if (dtype == DType::e4m3)
    quantize_lanes_of_row<From, DType::e4m3>(source, scale, out, dim);
  else
    quantize_lanes_of_row<From, DType::e5m2>(source, scale, out, dim);
}

void quantize_row(DType source_dtype, const void* source, float scale, DType dtype, void* out, int64_t dim) {
  if (source_dtype == DType::f32)
    quantize_row_of<DType::f32>(source, scale, dtype, out, dim);
  else if (source_dtype == DType::bf16)
    quantize_row_of<DType::bf16>(source, scale, dtype, out, dim);
  else
    quantize_row_of<DType::f16>(source, scale, dtype, out, dim);
}

// The largest magnitude of a row, leaving NaN out: a scale must be a number.
float absolute_max(DType dtype, const void* source, int64_t dim) {
  vf top = vf{};
  for (int64_t i = 0; i < dim; i += W) {
    top = vmax(vabs(load_lanes(dtype, source, i, lanes_left(dim, i))), top);
  }
  return hmax(top);
}

void merge_row(const MergeArgs& args, int64_t token, int64_t head) {
  const int64_t rows = args.num_tokens * args.num_heads, row = token * args.num_heads + head, dim = args.head_dim;
  const float sink = args.sinks ? args.sinks[head] : kNegInf;
  float top = sink, poison = 0.0f;
  bool seen = false;
  for (int64_t p = 0; p < args.num_parts; ++p) {
    const float lse = args.lses[p * rows + row];
    seen = seen || lse != kNegInf;
    if (lse != lse) poison = lse;
    if (lse > top) top = lse;
  }
  const float base = top == kNegInf ? 0.0f : top;
  float total = (args.sinks ? __builtin_expf(sink - base) : 0.0f) + poison;
  for (int64_t p = 0; p < args.num_parts; ++p) total += __builtin_expf(args.lses[p * rows + row] - base);
  args.lse[row] = seen ? base + __builtin_logf(total) : sink;
  constexpr int64_t kLanes = 8 * W;  // of the sums that share one weight
  for (int64_t begin = 0; begin < dim; begin += kLanes) {
    const int64_t end = begin + kLanes < dim ? begin + kLanes : dim;
    vf sums[kLanes / W] = {};
    for (int64_t p = 0; p < args.num_parts; ++p) {
      const float lse = args.lses[p * rows + row];
      if (lse == kNegInf) continue;
      const float weight = __builtin_expf(lse - base);
      const char* part = (const char*)args.outs + (p * rows + row) * dim * element_size(args.dtype);
      vf* sum = sums;
      for (int64_t i = begin; i < end; i += W, ++sum)
        *sum = *sum + load_lanes(args.dtype, part, i, lanes_left(dim, i)) * weight;
    }
    const vf* sum = sums;
    for (int64_t i = begin; i < end; i += W, ++sum)
      store_lanes(args.dtype, args.out, row * dim + i, seen ? *sum / total : vf{}, lanes_left(dim, i));
  }
}

constexpr KernelTable make_table(const char* name) {
  return KernelTable{
      name,     attention_scratch_bytes, attention_item, attention_merge, decode_row, quantize_row, absolute_max,
      merge_row};
}

}  // namespace
}  // namespace torch_paged
