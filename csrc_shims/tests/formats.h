// The storage types as numbers: bit by bit, so that nothing here shares a mistake with the kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "params.h"

namespace torch_paged {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Format {
  int exponent_bits, mantissa_bits, bias;
  bool infinities;
};

inline Format format(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return {8, 23, 127, true};
    case DType::bf16:
      return {8, 7, 127, true};
    case DType::f16:
      return {5, 10, 15, true};
    case DType::e4m3:
      return {4, 3, 7, false};
    default:
      return {5, 2, 15, true};
  }
}

inline double decode(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::i8) return static_cast<const int8_t*>(data)[i];
  const Format f = format(dtype);
  uint32_t bits = 0;
  const int64_t size = element_size(dtype);
  std::memcpy(&bits, static_cast<const char*>(data) + i * size, size);
  const int mantissa = bits & ((1u << f.mantissa_bits) - 1), top = (1 << f.exponent_bits) - 1;
  const int exponent = (bits >> f.mantissa_bits) & top;
  const double sign = bits >> (f.mantissa_bits + f.exponent_bits) ? -1 : 1;
  if (exponent == top && f.infinities) return mantissa ? std::nan("") : sign * kInfinity;
  if (exponent == top && mantissa == (1 << f.mantissa_bits) - 1) return std::nan("");
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - f.bias - f.mantissa_bits);
  return sign * std::ldexp(mantissa + (1 << f.mantissa_bits), exponent - f.bias - f.mantissa_bits);
}

// Only for values that the dtype holds exactly, and for NaN.
inline void encode(DType dtype, void* data, int64_t i, double value) {
  const Format f = format(dtype);
  const int64_t size = element_size(dtype);
  uint32_t bits = 0;
  if (std::isnan(value)) {
    bits = (1u << (f.mantissa_bits + f.exponent_bits)) - 1;
  } else if (value != 0) {
    int exponent;
    const double fraction = std::frexp(std::fabs(value), &exponent);
    bits = static_cast<uint32_t>(std::ldexp(fraction * 2 - 1, f.mantissa_bits)) |
           static_cast<uint32_t>(exponent - 1 + f.bias) << f.mantissa_bits |
           (value < 0 ? 1u << (f.mantissa_bits + f.exponent_bits) : 0);
  }
  std::memcpy(static_cast<char*>(data) + i * size, &bits, size);
}

inline double rounded(double x, DType dtype) {
  if (dtype == DType::f32) return static_cast<float>(x);
  if (x == 0 || !std::isfinite(x)) return x;
  int exponent;
  const double fraction = std::frexp(x, &exponent);
  const int bits = format(dtype).mantissa_bits + 1;
  return std::ldexp(std::nearbyint(std::ldexp(fraction, bits)), exponent - bits);
}

}  // namespace torch_paged
