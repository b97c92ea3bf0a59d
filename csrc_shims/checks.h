// The one error style of every op: `<op>: <argument> must <rule>, got <value>[ at index i]`, always
// std::invalid_argument (ValueError in Python). The rules are those of torch_paged/contract/validate.py (shapes,
// dtypes, devices, scalars) and bounds.py (values), in the same order and with the same sentences. No string is built
// unless a rule is broken.
#pragma once

#include <cmath>
#include <cstdio>
#include <initializer_list>

#include "tensor.h"

namespace torch_paged {

[[noreturn, gnu::noinline, gnu::cold]] inline void fail(const char* op, const std::string& argument,
                                                        const std::string& rule, const std::string& got) {
  throw std::invalid_argument(std::string(op) + ": " + argument + " must " + rule + ", got " + got);
}

[[gnu::noinline, gnu::cold]] inline std::string show_tuple(const int64_t* values, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i > 0 ? ", " : "") + std::to_string(values[i]);
  return text + (count == 1 ? ",)" : ")");
}
[[gnu::noinline, gnu::cold]] inline std::string show_shape(const Tensor& t) { return show_tuple(t.sizes, t.rank); }
[[gnu::noinline, gnu::cold]] inline std::string show_presence(const Tensor& t) {
  return t.defined() ? "a tensor of shape " + show_shape(t) : "None";
}
[[gnu::noinline, gnu::cold]] inline std::string show(int64_t value) { return std::to_string(value); }
[[gnu::noinline, gnu::cold]] inline std::string show_real(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return std::isnan(value) ? "nan" : text;
}

inline const char* type_name(Type type) {
  static const char* const names[] = {"float32",     "bfloat16", "float16", "int8", "float8_e4m3fn",
                                      "float8_e5m2", "int64",    "int32",   "bool"};
  return names[static_cast<int>(type)];
}

[[gnu::noinline, gnu::cold]] inline std::string show_type(const Tensor& t) {
  if (t.type != Type::other) return type_name(t.type);
  const std::pair<int32_t, const char*> others[] = {{aoti_torch_dtype_float64(), "float64"},
                                                    {aoti_torch_dtype_uint8(), "uint8"},
                                                    {aoti_torch_dtype_uint16(), "uint16"},
                                                    {aoti_torch_dtype_uint32(), "uint32"},
                                                    {aoti_torch_dtype_uint64(), "uint64"},
                                                    {aoti_torch_dtype_int16(), "int16"},
                                                    {aoti_torch_dtype_complex32(), "complex32"},
                                                    {aoti_torch_dtype_complex64(), "complex64"},
                                                    {aoti_torch_dtype_complex128(), "complex128"},
                                                    {aoti_torch_dtype_float8_e4m3fnuz(), "float8_e4m3fnuz"},
                                                    {aoti_torch_dtype_float8_e5m2fnuz(), "float8_e5m2fnuz"}};
  for (const auto& [code, name] : others) {
    if (code == t.type_code) return name;
  }
  return "dtype number " + std::to_string(t.type_code);
}

inline void check_required(const char* op, const Stack& stack) {
  if (stack.missing() != nullptr) fail(op, stack.missing(), "be given", "None");
}

using Types = unsigned;
constexpr Types types(std::initializer_list<Type> list) {
  Types mask = 0;
  for (Type type : list) mask |= 1u << static_cast<int>(type);
  return mask;
}
constexpr Types kFloats = types({Type::f32, Type::bf16, Type::f16});
constexpr Types kQuantized = types({Type::i8, Type::e4m3, Type::e5m2});
constexpr Types kFloat32 = types({Type::f32});
constexpr Types kInt32 = types({Type::i32});
constexpr Types kInts = types({Type::i64, Type::i32});
constexpr Types kBool = types({Type::boolean});

// The letters of the contract. `two` is the leading size of a cache: 2, or 1 when latent. Bp1 is B + 1.
// `Pairs` is P as the number of block pairs, which may be 0.
enum class Dim : int { two, T, B, H, KH, D, N, S, M, DS, C, P, DV, Tk, Pairs, Bp1 };
constexpr int kNumDims = 16;

// The tensors of one call: dtype, device and shape of each, with one value per letter over the whole call.
class Shapes {
 public:
  explicit Shapes(const char* op) : op(op) {}

  const char* const op;

  int64_t operator[](Dim dim) const { return values_[static_cast<int>(dim)]; }

  // `like`: the dtype of that tensor is allowed too.
  void check(const Tensor& t, Types allowed, std::initializer_list<Dim> dims, const Tensor* like = nullptr) {
    if (!t.defined()) return;
    check_type(t, allowed, like);
    if (t.rank != static_cast<int64_t>(dims.size())) fail_shape(t, dims);
    check_dims(t, dims);
  }

  void check_type(const Tensor& t, Types allowed, const Tensor* like = nullptr) {
    if (first_ == nullptr) first_ = &t;
    if (t.device_type() != aoti_torch_device_type_cpu()) fail_device(t);
    if ((allowed >> static_cast<int>(t.type) & 1u) == 0 && (like == nullptr || like->type != t.type)) {
      fail_type(t, allowed, like);
    }
  }

  void check_dims(const Tensor& t, std::initializer_list<Dim> dims) {
    int64_t axis = 0;
    for (Dim dim : dims) {
      int64_t size = t.size(axis++);
      const bool plus_one = dim == Dim::Bp1;
      const int letter = static_cast<int>(plus_one ? Dim::B : dim);
      size -= plus_one ? 1 : 0;
      if (values_[letter] < 0) {
        if (size < smallest(dim) || (dim == Dim::two && size > 2)) fail_smallest(t, dims, dim);
        values_[letter] = size;
        sources_[letter] = &t;
      } else if (values_[letter] != size) {
        fail_mismatch(t, dims, dim);
      }
    }
  }

  [[noreturn, gnu::noinline, gnu::cold]] void fail_shape(const Tensor& t, std::initializer_list<Dim> dims) const {
    fail(op, t.name, "have shape " + describe(dims), show_shape(t));
  }

  const char* source(Dim dim) const { return sources_[static_cast<int>(dim)]->name; }

 private:
  std::array<int64_t, kNumDims> values_ = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  std::array<const Tensor*, kNumDims> sources_ = {};
  const Tensor* first_ = nullptr;

  static int64_t smallest(Dim dim) {
    constexpr unsigned zero_is_legal = 1u << static_cast<int>(Dim::T) | 1u << static_cast<int>(Dim::B) |
                                       1u << static_cast<int>(Dim::N) | 1u << static_cast<int>(Dim::M) |
                                       1u << static_cast<int>(Dim::C) | 1u << static_cast<int>(Dim::Tk) |
                                       1u << static_cast<int>(Dim::Pairs) | 1u << static_cast<int>(Dim::Bp1);
    return zero_is_legal >> static_cast<int>(dim) & 1u ? 0 : 1;
  }

  static std::string letter(Dim dim) {
    static const char* const names[] = {"2", "T",  "B", "H", "KH", "D",  "N", "S",
                                        "M", "DS", "C", "P", "DV", "Tk", "P", "B + 1"};
    return names[static_cast<int>(dim)];
  }

  [[gnu::noinline, gnu::cold]] static std::string describe(std::initializer_list<Dim> dims, int64_t two) {
    std::string text;
    for (Dim dim : dims) text += (text.empty() ? "" : ", ") + (dim == Dim::two ? show(two) : letter(dim));
    return "(" + text + (dims.size() == 1 ? ",)" : ")");
  }
  [[gnu::noinline, gnu::cold]] std::string describe(std::initializer_list<Dim> dims) const {
    if (*dims.begin() != Dim::two) return describe(dims, 0);
    const int64_t two = (*this)[Dim::two];
    return two > 0 ? describe(dims, two) : describe(dims, 2) + " or " + describe(dims, 1);
  }

  [[noreturn, gnu::noinline, gnu::cold]] void fail_smallest(const Tensor& t, std::initializer_list<Dim> dims,
                                                            Dim dim) const {
    if (dim == Dim::two) fail_shape(t, dims);
    const Dim name = dim == Dim::Bp1 ? Dim::B : dim;
    fail(op, t.name, "have shape " + describe(dims) + " with " + letter(name) + " >= " + show(smallest(dim)),
         show_shape(t));
  }

  [[noreturn, gnu::noinline, gnu::cold]] void fail_mismatch(const Tensor& t, std::initializer_list<Dim> dims,
                                                            Dim dim) const {
    if (dim == Dim::two) fail_shape(t, dims);
    const Dim name = dim == Dim::Bp1 ? Dim::B : dim;
    fail(op, t.name,
         "have shape " + describe(dims) + " with " + letter(name) + " = " + show((*this)[name]) + " as in " +
             source(name),
         show_shape(t));
  }

  [[noreturn, gnu::noinline, gnu::cold]] void fail_device(const Tensor& t) const {
    const int32_t device = t.device_type();
    const char* got = device == aoti_torch_device_type_meta()   ? "meta"
                      : device == aoti_torch_device_type_cuda() ? "cuda"
                      : device == aoti_torch_device_type_xpu()  ? "xpu"
                                                                : "another device";
    if (first_ == &t) fail(op, t.name, "be on cpu", got);
    fail(op, t.name, std::string("be on cpu as ") + first_->name + " is", got);
  }

  [[noreturn, gnu::noinline, gnu::cold]] void fail_type(const Tensor& t, Types allowed, const Tensor* like) const {
    std::vector<std::string> names;
    if (like != nullptr) names.push_back(std::string(type_name(like->type)) + " as " + like->name + " is");
    for (int i = 0; i < static_cast<int>(Type::other); ++i) {
      if (allowed >> i & 1u) names.push_back(type_name(static_cast<Type>(i)));
    }
    std::string text = names[0];
    for (size_t i = 1; i < names.size(); ++i) text += (i + 1 == names.size() ? " or " : ", ") + names[i];
    fail(op, t.name, "be " + text, show_type(t));
  }
};

inline bool is_quantized(const Tensor& t) { return is_quantized(t.dtype()); }

// A cache is used in place: its rows must be rows, and what is written must not be written twice.
inline void check_cache_strides(const char* op, const Tensor& cache) {
  if (!cache.has_unit_last_stride()) {
    fail(op, cache.name, "have a unit last stride", "strides " + show_tuple(cache.strides, cache.rank));
  }
}
inline void check_not_expanded(const char* op, const Tensor& t) {
  if (!t.defined()) return;
  for (int64_t d = 0; d < t.rank; ++d) {
    if (t.size(d) > 1 && t.stride(d) == 0) {
      fail(op, t.name, "not be an expanded view, it is written", "strides " + show_tuple(t.strides, t.rank));
    }
  }
}

inline void check_scales_presence(const char* op, const Tensor& cache, const Tensor& scales) {
  if (is_quantized(cache) == scales.defined()) return;
  fail(op, scales.name,
       std::string(is_quantized(cache) ? "be given" : "be None") + " for a kv_cache of " + type_name(cache.type),
       show_presence(scales));
}

enum class ScalesRank { any, not_per_token, per_token };

// dtype and shape of kv_scales, once the cache has bound its letters.
inline void check_scales(Shapes& shapes, const Tensor& scales, ScalesRank allowed) {
  if (!scales.defined()) return;
  shapes.check_type(scales, kFloat32);
  if (scales.rank == 1 && allowed != ScalesRank::per_token) {
    shapes.check_dims(scales, {Dim::two});
  } else if (scales.rank == 2 && allowed != ScalesRank::per_token) {
    shapes.check_dims(scales, {Dim::two, Dim::KH});
  } else if (scales.rank == 4 && allowed != ScalesRank::not_per_token) {
    shapes.check_dims(scales, {Dim::two, Dim::N, Dim::KH, Dim::S});
  } else if (allowed == ScalesRank::per_token) {
    shapes.fail_shape(scales, {Dim::two, Dim::N, Dim::KH, Dim::S});
  } else {
    const std::string n = show(shapes[Dim::two]);
    const std::string shape = allowed == ScalesRank::any ? "(" + n + ",), (" + n + ", KH) or (" + n + ", N, KH, S)"
                                                         : "(" + n + ",) or (" + n + ", KH)";
    fail(shapes.op, scales.name, "have shape " + shape, show_shape(scales));
  }
}

// Values of kv_scales of rank 1 and 2. Per-token scales are too many to look at in every call.
inline void check_scale_values(const char* op, const Tensor& scales) {
  if (!scales.defined() || scales.rank > 2) return;
  const float* data = scales.data<float>();
  const int64_t columns = scales.rank == 2 ? scales.size(1) : 1;
  const int64_t column_stride = scales.rank == 2 ? scales.stride(1) : 0;
  for (int64_t i = 0; i < scales.size(0); ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const float value = data[i * scales.stride(0) + j * column_stride];
      if (!(value > 0.0f) || std::isinf(value)) {
        const int64_t index[2] = {i, j};
        fail(op, scales.name, "be finite and > 0",
             show_real(value) + " at index " + (scales.rank == 2 ? show_tuple(index, 2) : show(i)));
      }
    }
  }
}

// Every value of an index tensor lies in [low, high). `what` spells the interval, with its letters.
template <class T, class Describe>
inline void check_indices(const char* op, const char* name, const T* values, int64_t count, int64_t low, int64_t high,
                          Describe&& describe) {
  bool broken = false;
  for (int64_t i = 0; i < count; ++i) broken |= values[i] < low || values[i] >= high;
  if (!broken) return;
  for (int64_t i = 0; i < count; ++i) {
    if (values[i] < low || values[i] >= high) {
      fail(op, name, "lie in " + describe(), show(values[i]) + " at index " + show(i));
    }
  }
}

}  // namespace torch_paged
