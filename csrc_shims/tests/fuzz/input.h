// Structured input: the fuzzer's bytes say sizes, strides, options and what is corrupted; a seed among them fills the
// elements, whose values the control flow of a kernel hardly depends on.
#pragma once

#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <initializer_list>
#include <stdexcept>

#include "../formats.h"
#include "host.h"

namespace torch_paged::fuzz {

// Elements that a storage type holds exactly, none of them large: bits and value.
struct Numbers {
  static constexpr int kCount = 128;
  uint32_t bits[kCount];
  double values[kCount];

  explicit Numbers(DType dtype) {
    for (int i = 0; i < kCount; ++i) {
      bits[i] = 0;
      if (dtype == DType::i8) {
        bits[i] = static_cast<uint8_t>(2 * i - 128 + i % 2);
      } else if (is_quantized(dtype)) {
        const int mantissa_bits = format(dtype).mantissa_bits, bias = format(dtype).bias;
        bits[i] = (i & 1 ? 0x80 : 0) | (bias - 3 + (i >> 1) % 4) << mantissa_bits | ((i >> 3) % (1 << mantissa_bits));
      } else {
        encode(dtype, &bits[i], 0, (i - 63) / 32.0);
      }
      values[i] = decode(dtype, &bits[i], 0);
    }
  }

  static const Numbers& of(DType dtype) {
    static const Numbers all[] = {Numbers(DType::f32), Numbers(DType::bf16), Numbers(DType::f16),
                                  Numbers(DType::i8),  Numbers(DType::e4m3), Numbers(DType::e5m2)};
    return all[static_cast<int>(dtype)];
  }
};

// What a stored element means, for every type but float32 by a table.
inline double number_at(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::f32) {
    float x;
    std::memcpy(&x, static_cast<const char*>(data) + 4 * i, 4);
    return x;
  }
  static const std::array<std::vector<double>, 6> tables = [] {
    std::array<std::vector<double>, 6> all;
    for (int t = 1; t < 6; ++t) {
      const auto type = static_cast<DType>(t);
      const uint32_t count = element_size(type) == 2 ? 65536 : 256;
      for (uint32_t bits = 0; bits < count; ++bits) all[t].push_back(decode(type, &bits, 0));
    }
    return all;
  }();
  const auto& table = tables[static_cast<int>(dtype)];
  if (element_size(dtype) == 1) return table[static_cast<const uint8_t*>(data)[i]];
  return table[static_cast<const uint16_t*>(data)[i]];
}

struct TooLarge {};  // an input beyond what is worth a run

class Input {
 public:
  // Only a rude input may break the rules of shapes, types and strides; only a corrupting one those of values.
  bool rude = false, corrupting = false;

  Input(const uint8_t* data, size_t size) : provider_(data, size) {
    const int kind = number(0, 7);
    rude = kind == 6;
    corrupting = kind == 7;
    random_ = 0x9e3779b97f4a7c15ull * (provider_.ConsumeIntegral<uint16_t>() + 1);
  }

  int64_t number(int64_t low, int64_t high) { return provider_.ConsumeIntegralInRange<int64_t>(low, high); }
  bool flag() { return provider_.ConsumeBool(); }
  bool once_in(int n) { return number(0, n - 1) == n - 1; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return *(choices.begin() + number(0, static_cast<int64_t>(choices.size()) - 1));
  }
  template <class T>
  T anything() {
    return provider_.ConsumeIntegral<T>();
  }
  double any_real() {
    const uint64_t bits = anything<uint64_t>();
    double x;
    std::memcpy(&x, &bits, sizeof(x));
    return x;
  }
  std::optional<int64_t> width(int64_t usual) {  // of windows and chunks
    const int kind = number(0, 5);
    if (kind < 3) return std::nullopt;
    if (kind == 5) return rude ? anything<int64_t>() : number(1, INT64_MAX);
    return number(1, usual);
  }

  // Numbers that follow from the seed.
  uint64_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return random_;
  }
  int64_t random_below(int64_t n) { return static_cast<int64_t>((random() >> 11) % static_cast<uint64_t>(n)); }

  // A tensor of these sizes with strides of the input's choosing. The last axis is a row unless `any_stride`;
  // `expandable`: an axis may have stride 0.
  HostTensor tensor(int32_t type, std::initializer_list<int64_t> sizes, bool any_stride = false,
                    bool expandable = false) {
    HostTensor t;
    t.rank = static_cast<int64_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), t.sizes.begin());
    t.type = type;
    const int kind = number(0, 3);
    std::array<int64_t, 6> order = {};  // axes, the innermost first
    for (int64_t d = 0; d < t.rank; ++d) order[d] = t.rank - 1 - d;
    if (rude) spoil(t);
    if (kind >= 2)
      for (int64_t d = any_stride ? 0 : 1; d + 1 < t.rank; ++d) std::swap(order[d], order[number(d, t.rank - 1)]);
    int64_t running = any_stride && kind == 3 ? number(1, 3) : 1;
    for (int64_t d = 0; d < t.rank; ++d) {
      t.strides[order[d]] = running;
      running *= std::max<int64_t>(1, t.sizes[order[d]]);
      if (kind == 3) running += number(0, 5);
    }
    if (expandable && t.rank > 1 && once_in(8)) t.strides[number(0, t.rank - 2)] = 0;
    if (rude && t.rank > 0 && once_in(8)) t.strides[number(0, t.rank - 1)] = number(0, 4);
    if (kind == 3) t.offset = number(0, 3);
    if (!t.allocate()) throw TooLarge();
    return t;
  }

  // Random numbers of its type in `count` lanes of the last axis, from a place on.
  void fill_lanes(const HostTensor& t, int64_t place, int64_t count) {
    const Numbers& numbers = Numbers::of(static_cast<DType>(t.type));
    const int64_t bytes = bytes_of(t.type), step = bytes * t.strides[t.rank - 1];
    char* to = t.data() + place * bytes;
    uint64_t bits = 0;
    for (int64_t i = 0; i < count; ++i, to += step, bits >>= 7) {
      if (i % 9 == 0) bits = random();
      std::memcpy(to, &numbers.bits[bits & 127], bytes);
    }
  }
  void fill_tokens(const HostTensor& t, int64_t begin, int64_t count) {  // of (tokens, heads, lanes)
    for (int64_t i = begin; i < begin + count; ++i)
      for (int64_t h = 0; h < t.sizes[1]; ++h) fill_lanes(t, t.at(i, h), t.sizes[2]);
  }

  // One value of an index tensor becomes whatever the input says.
  template <class T>
  void corrupt(const HostTensor& t) {
    if (!corrupting || t.numel() == 0 || t.rank > 2 || !once_in(3)) return;
    const int64_t i = number(0, t.sizes[0] - 1), j = t.rank == 2 ? number(0, t.sizes[1] - 1) : 0;
    T value = static_cast<T>(number(-4, 300));
    if (const uint64_t bits = anything<uint64_t>(); bits % 2) std::memcpy(&value, &bits, sizeof(value));
    t.item<T>(i, j) = value;
  }

 private:
  FuzzedDataProvider provider_;
  uint64_t random_;

  void spoil(HostTensor& t) {
    if (!once_in(6)) return;
    switch (number(0, 4)) {
      case 0:
        t.sizes[number(0, t.rank - 1)] = number(0, 9);
        break;
      case 1:
        t.rank = std::max<int64_t>(1, t.rank - 1);
        break;
      case 2:
        t.sizes[t.rank] = number(0, 3);
        ++t.rank;
        break;
      case 3:
        t.type = static_cast<int32_t>(number(0, 9));
        break;
      default:
        t.on_cpu = false;
        break;
    }
  }
};

// Whether a call was accepted. An input that is neither rude nor corrupting must be, and a refusal must be one of those
// that the library documents.
inline bool was_accepted(Call& call, const Input& input, const char* op, int results = 0,
                         std::vector<HostTensor>* taken = nullptr, int threads = 1) {
  try {
    std::vector<HostTensor> all = call.run(op, results, threads);
    if (taken != nullptr) *taken = std::move(all);
    return true;
  } catch (const std::invalid_argument& error) {
    if (!input.rude && !input.corrupting) found(std::string("a valid call is refused: ") + error.what());
    if (std::strncmp(error.what(), op, std::strcspn(op, ".")) != 0) found(std::string("no op named: ") + error.what());
  } catch (const std::runtime_error& error) {  // no memory for a result
    if (std::strcmp(error.what(), "torch_paged: torch failed in empty_strided") != 0) throw;
  }
  return false;
}

inline std::vector<HostTensor> results_of(Call& call, const Input& input, const char* op, int results,
                                          int threads = 1) {
  std::vector<HostTensor> taken;
  was_accepted(call, input, op, results, &taken, threads);
  return taken;
}

template <class Body>
int one_execution(const uint8_t* data, size_t size, const Body& body) {
  try {
    Input in(data, size);
    body(in);
  } catch (const TooLarge&) {
  }
  return 0;
}

}  // namespace torch_paged::fuzz
