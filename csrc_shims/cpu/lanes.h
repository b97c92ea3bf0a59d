// Lanes [i, i + n), n <= W, of a row whose type is known at run time.
#pragma once

#include "simd.h"

namespace torch_paged {
namespace {

TP_INLINE vf load_lanes(DType dtype, const void* source, int64_t i, int n) {
  const char* p = (const char*)source + i * element_size(dtype);
  switch (dtype) {
    case DType::f32:
      return n == W ? decode<DType::f32>(p) : decode_partial<DType::f32>(p, n);
    case DType::bf16:
      return n == W ? decode<DType::bf16>(p) : decode_partial<DType::bf16>(p, n);
    case DType::f16:
      return n == W ? decode<DType::f16>(p) : decode_partial<DType::f16>(p, n);
    case DType::i8:
      return n == W ? decode<DType::i8>(p) : decode_partial<DType::i8>(p, n);
    case DType::e4m3:
      return n == W ? decode<DType::e4m3>(p) : decode_partial<DType::e4m3>(p, n);
    default:
      return n == W ? decode<DType::e5m2>(p) : decode_partial<DType::e5m2>(p, n);
  }
}

TP_INLINE void store_lanes(DType dtype, void* out, int64_t i, vf x, int n) {
  char* p = (char*)out + i * element_size(dtype);
  switch (dtype) {
    case DType::f32:
      n == W ? encode<DType::f32>(p, x) : encode_partial<DType::f32>(p, x, n);
      break;
    case DType::bf16:
      n == W ? encode<DType::bf16>(p, x) : encode_partial<DType::bf16>(p, x, n);
      break;
    default:
      n == W ? encode<DType::f16>(p, x) : encode_partial<DType::f16>(p, x, n);
      break;
  }
}

TP_INLINE int lanes_left(int64_t dim, int64_t i) { return dim - i >= W ? W : (int)(dim - i); }

}  // namespace
}  // namespace torch_paged
