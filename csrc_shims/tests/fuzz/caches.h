// A cache with what an op on its blocks takes.
#pragma once

#include "input.h"

namespace torch_paged::fuzz {

struct CacheProblem {
  DType dtype;
  bool latent;
  int64_t planes, num_blocks, num_kv_heads, block_size, stored_dim;
  int scales_rank = 0;
  HostTensor cache, scales;  // filled with numbers

  // `ranks`: of the scales, where the cache has some.
  CacheProblem(Input& in, std::initializer_list<DType> dtypes, std::initializer_list<int> ranks) {
    dtype = in.pick(dtypes);
    latent = in.once_in(4);
    planes = latent ? 1 : 2;
    num_blocks = in.number(0, 6);
    num_kv_heads = in.number(1, 4);
    block_size = in.flag() ? in.number(1, 5) : in.pick<int64_t>({1, 7, 16, 33});
    stored_dim = in.flag() ? in.number(1, 40) : in.pick<int64_t>({16, 17, 32, 63, 64, 65, 128});
    if (is_quantized(dtype)) scales_rank = in.pick(ranks);
    cache = in.tensor(static_cast<int32_t>(dtype), {planes, num_blocks, num_kv_heads, block_size, stored_dim}, in.rude);
    if (scales_rank == 1) scales = in.tensor(kF32, {planes}, true);
    if (scales_rank == 2) scales = in.tensor(kF32, {planes, num_kv_heads}, true);
    if (scales_rank == 4) scales = in.tensor(kF32, {planes, num_blocks, num_kv_heads, block_size}, true);
    if (in.rude) return;
    for_each_row([&](int64_t plane, int64_t block, int64_t head, int64_t offset) {
      in.fill_lanes(cache, cache.at(plane, block, head, offset), stored_dim);
      if (scales_rank == 4) scales.item<float>(plane, block, head, offset) = some_scale(in);
    });
    for (int64_t plane = 0; plane < planes; ++plane) {
      if (scales_rank == 1) scales.item<float>(plane) = some_scale(in);
      for (int64_t h = 0; scales_rank == 2 && h < num_kv_heads; ++h) scales.item<float>(plane, h) = some_scale(in);
    }
  }

  static float some_scale(Input& in) { return static_cast<float>(in.random_below(63) + 1) / 64; }

  template <class Body>
  void for_each_row(const Body& body) const {
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t block = 0; block < num_blocks; ++block)
        for (int64_t head = 0; head < num_kv_heads; ++head)
          for (int64_t offset = 0; offset < block_size; ++offset) body(plane, block, head, offset);
  }

  float scale_at(int64_t plane, int64_t block, int64_t head, int64_t offset) const {
    if (scales_rank == 1) return scales.item<float>(plane);
    if (scales_rank == 2) return scales.item<float>(plane, head);
    return scales_rank == 4 ? scales.item<float>(plane, block, head, offset) : 1.0f;
  }
};

// The bytes that a call may write, copied before it: what they must be is then written to the copy.
struct Expected {
  const HostTensor& live;
  HostTensor copy;

  explicit Expected(const HostTensor& t) : live(t), copy(t) {
    if (!t.memory) return;
    copy.allocate();
    std::memcpy(copy.data(), t.data(), t.reached_bytes());
  }
  char* row(int64_t place) const { return copy.data() + place * bytes_of(copy.type); }
  void check(const char* what) const {
    if (live.memory && std::memcmp(live.data(), copy.data(), live.reached_bytes()) != 0) found(what);
  }
};

}  // namespace torch_paged::fuzz
