// What the binding sees of torch, in a process without torch: tensors whose memory has exactly the bytes that their
// sizes and strides reach, so that an access one byte beyond is reported, and the ops that the binding registers.
// A fuzz target so goes through the binding's own checks.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "params.h"

namespace torch_paged::fuzz {

// The types of tensors. The first six are DType, in its order; no op takes the last one.
enum TypeCode : int32_t { kF32, kBF16, kF16, kI8, kE4M3, kE5M2, kI64, kI32, kBool, kF64 };

inline int64_t bytes_of(int32_t type) {
  static constexpr int64_t bytes[] = {4, 2, 2, 1, 1, 1, 8, 4, 1, 8};
  return bytes[type];
}

struct HostTensor {
  int64_t rank = 0;
  std::array<int64_t, 6> sizes = {}, strides = {};
  int32_t type = kF32;
  bool on_cpu = true;
  int64_t offset = 0;            // of the first element
  int64_t reach = 0;             // elements from the first one to the last one
  std::shared_ptr<char> memory;  // null without elements

  bool defined() const { return rank > 0; }
  int64_t numel() const {
    int64_t count = 1;
    for (int64_t d = 0; d < rank; ++d) count *= sizes[d];
    return count;
  }
  char* data() const { return memory ? memory.get() + offset * bytes_of(type) : nullptr; }
  int64_t reached_bytes() const { return reach * bytes_of(type); }
  template <class... Index>
  int64_t at(Index... index) const {
    int64_t place = 0, d = 0;
    ((place += index * strides[d++]), ...);
    return place;
  }
  template <class T, class... Index>
  T& item(Index... index) const {
    return reinterpret_cast<T*>(data())[at(index...)];
  }

  // Every byte is 0xff: NaN in each floating type. False where no machine has that memory.
  bool allocate();
  std::string contents() const { return memory ? std::string(data(), reached_bytes()) : std::string(); }
};

// The arguments of one boxed call, in the order of the schema.
class Call {
 public:
  void tensor(const HostTensor& t);  // not defined: None, for an argument that must be given nothing else is passed
  void optional_tensor(const HostTensor& t);
  void integer(int64_t value) { put(value); }
  void real(double value) { put(value); }
  void boolean(bool value) { put(value); }
  void optional_integer(std::optional<int64_t> value) { put_optional(value); }
  void optional_real(std::optional<double> value) { put_optional(value); }

  // Returns the results; throws what the op throws. `threads`: what OpenMP says it has.
  std::vector<HostTensor> run(const char* op, int results, int threads = 1);

 private:
  std::vector<uint64_t> stack_;

  template <class T>
  void put(T value) {
    stack_.push_back(0);
    std::memcpy(&stack_.back(), &value, sizeof(value));
  }
  template <class T>
  void put_optional(std::optional<T> value) {
    uint64_t* boxed = value ? new uint64_t(0) : nullptr;
    if (value) std::memcpy(boxed, &*value, sizeof(*value));
    put(boxed);
  }
};

// Ends the process as a crash does, with a sentence.
[[noreturn]] void found(const std::string& what);

}  // namespace torch_paged::fuzz
