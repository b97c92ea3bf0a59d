// Tensors and arguments as the stable ABI of torch 2.9 hands them over: a thin owner around the C shim, nothing else.
// One boxed call reads its arguments with Stack, checks them (checks.h) and writes its results back.
#pragma once

#ifndef TORCH_TARGET_VERSION
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 9) << 48))
#endif

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "cpu/dense.h"
#include "cpu/params.h"

namespace torch_paged {

inline void shim(AOTITorchError code, const char* what) {
  if (code != 0) throw std::runtime_error(std::string("torch_paged: torch failed in ") + what);
}

// Element types that some op takes. The first six are DType, in its order.
enum class Type : int { f32, bf16, f16, i8, e4m3, e5m2, i64, i32, boolean, other };

struct TypeTable {
  std::array<Type, 128> type;
  TypeTable() {
    type.fill(Type::other);
    set(aoti_torch_dtype_float32(), Type::f32);
    set(aoti_torch_dtype_bfloat16(), Type::bf16);
    set(aoti_torch_dtype_float16(), Type::f16);
    set(aoti_torch_dtype_int8(), Type::i8);
    set(aoti_torch_dtype_float8_e4m3fn(), Type::e4m3);
    set(aoti_torch_dtype_float8_e5m2(), Type::e5m2);
    set(aoti_torch_dtype_int64(), Type::i64);
    set(aoti_torch_dtype_int32(), Type::i32);
    set(aoti_torch_dtype_bool(), Type::boolean);
  }
  void set(int32_t code, Type value) { type[static_cast<size_t>(code)] = value; }
};

inline int64_t bytes_of(Type type) {
  switch (type) {
    case Type::i64:
      return 8;
    case Type::f32:
    case Type::i32:
      return 4;
    case Type::bf16:
    case Type::f16:
      return 2;
    default:
      return 1;
  }
}

inline Type type_of(int32_t code) {
  static const TypeTable table;
  return code >= 0 && code < 128 ? table.type[static_cast<size_t>(code)] : Type::other;
}

// Owns a handle of the shim. An absent optional argument is a Tensor that is not defined.
class Tensor {
 public:
  const char* name = "";
  int64_t rank = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  Type type = Type::other;
  int32_t type_code = 0;

  Tensor() = default;
  Tensor(const char* name, AtenTensorHandle handle) : name(name) {
    if (handle != nullptr) adopt(handle);
  }
  Tensor(Tensor&& other) noexcept { *this = std::move(other); }
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(handle_, other.handle_);
    name = other.name;
    rank = other.rank;
    sizes = other.sizes;
    strides = other.strides;
    type = other.type;
    type_code = other.type_code;
    return *this;
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (handle_ != nullptr) aoti_torch_delete_tensor_object(handle_);
  }

  static Tensor empty(std::initializer_list<int64_t> sizes, int32_t type_code) {
    return empty(sizes.begin(), static_cast<int64_t>(sizes.size()), type_code);
  }

  bool defined() const { return handle_ != nullptr; }
  int64_t size(int64_t dim) const { return sizes[dim]; }
  int64_t stride(int64_t dim) const { return strides[dim]; }
  DType dtype() const { return static_cast<DType>(type); }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < rank; ++d) count *= sizes[d];
    return count;
  }

  int32_t device_type() const {
    int32_t device;
    shim(aoti_torch_get_device_type(handle_, &device), "get_device_type");
    return device;
  }

  template <class T>
  T* data() const {
    if (handle_ == nullptr) return nullptr;
    void* pointer;
    shim(aoti_torch_get_data_ptr(handle_, &pointer), "get_data_ptr");
    return static_cast<T*>(pointer);
  }

  bool has_unit_last_stride() const { return sizes[rank - 1] <= 1 || strides[rank - 1] == 1; }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int64_t d = rank - 1; d >= 0; --d) {
      if (sizes[d] == 0) return true;
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }

  // A read-only argument that the kernels cannot walk in place is copied once.
  void make_contiguous() {
    if (defined() && !is_contiguous()) become_dense();
  }
  void make_unit_last_stride() {
    if (defined() && !has_unit_last_stride()) make_contiguous();
  }
  // What is read while the other tensor is written.
  void make_apart_from(const Tensor& written) {
    if (defined() && written.defined() && begin() < written.end() && written.begin() < end()) become_dense();
  }

  AtenTensorHandle release() { return std::exchange(handle_, nullptr); }

 private:
  AtenTensorHandle handle_ = nullptr;

  static Tensor empty(const int64_t* sizes, int64_t rank, int32_t type_code) {
    std::array<int64_t, 8> strides;
    int64_t running = 1;
    for (int64_t d = rank - 1; d >= 0; --d) {
      strides[static_cast<size_t>(d)] = running;
      // A product beyond 64 bits wraps: the strides before it are already more than torch can allocate.
      (void)__builtin_mul_overflow(running, sizes[d] > 1 ? sizes[d] : 1, &running);
    }
    AtenTensorHandle handle;
    shim(aoti_torch_empty_strided(rank, sizes, strides.data(), type_code, aoti_torch_device_type_cpu(), 0, &handle),
         "empty_strided");
    return Tensor("", handle);
  }

  const char* begin() const { return data<char>(); }
  const char* end() const {
    int64_t reach = 1;
    for (int64_t d = 0; d < rank; ++d) {
      if (sizes[d] == 0) return begin();
      reach += (sizes[d] - 1) * strides[d];
    }
    return begin() + reach * bytes_of(type);
  }

  void become_dense() {
    Tensor copy = empty(sizes, rank, type_code);
    copy_dense(rank, sizes, strides, bytes_of(type), data<char>(), copy.data<char>());
    copy.name = name;
    *this = std::move(copy);
  }

  // A None given for a tensor that is not optional arrives as a handle of nothing.
  [[gnu::noinline, gnu::cold]] void drop_undefined() {
    bool is_defined = true;
    shim(aoti_torch_is_defined(handle_, &is_defined), "is_defined");
    if (is_defined) shim(1, "get_strides");
    aoti_torch_delete_tensor_object(std::exchange(handle_, nullptr));
  }

  void adopt(AtenTensorHandle handle) {
    handle_ = handle;
    int64_t* pointer;
    shim(aoti_torch_get_dim(handle, &rank), "get_dim");
    shim(aoti_torch_get_sizes(handle, &pointer), "get_sizes");
    sizes = pointer;
    if (aoti_torch_get_strides(handle, &pointer) != 0) return drop_undefined();
    strides = pointer;
    shim(aoti_torch_get_dtype(handle, &type_code), "get_dtype");
    type = type_of(type_code);
  }
};

// Reads the arguments of a boxed call in schema order, then takes its results. Every argument must be read before the
// first check may throw: reading is what passes ownership.
class Stack {
 public:
  explicit Stack(StableIValue* stack) : stack_(stack) {}

  Tensor tensor(const char* name) {
    Tensor tensor(name, as<AtenTensorHandle>(next()));
    if (!tensor.defined() && missing_ == nullptr) missing_ = name;
    return tensor;
  }
  Tensor optional_tensor(const char* name) { return Tensor(name, optional<AtenTensorHandle>().value_or(nullptr)); }
  int64_t integer() { return as<int64_t>(next()); }
  double real() { return as<double>(next()); }
  bool boolean() { return as<bool>(next()); }
  std::optional<int64_t> optional_integer() { return optional<int64_t>(); }
  std::optional<double> optional_real() { return optional<double>(); }

  // The first required tensor that was None, which torch passes on; null when there is none.
  const char* missing() const { return missing_; }

  void put(Tensor&& result) {
    AtenTensorHandle handle = result.release();
    std::memcpy(&stack_[results_++], &handle, sizeof(handle));
  }

 private:
  StableIValue* stack_;
  int64_t arguments_ = 0, results_ = 0;
  const char* missing_ = nullptr;

  StableIValue next() { return stack_[arguments_++]; }

  template <class T>
  static T as(StableIValue value) {
    T result;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    std::memcpy(&result, &value, sizeof(T));
#else
    std::memcpy(&result, reinterpret_cast<const char*>(&value) + sizeof(value) - sizeof(T), sizeof(T));
#endif
    return result;
  }

  template <class T>
  std::optional<T> optional() {
    auto* boxed = as<StableIValue*>(next());
    if (boxed == nullptr) return std::nullopt;
    T value = as<T>(*boxed);
    delete boxed;
    return value;
  }
};

}  // namespace torch_paged
