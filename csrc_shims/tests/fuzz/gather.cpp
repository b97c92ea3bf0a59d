// gather_cache: every element of both results.
#include "caches.h"

using namespace torch_paged;
using namespace torch_paged::fuzz;

namespace {

void gather(Input& in) {
  const CacheProblem cache(in, {DType::f32, DType::bf16, DType::f16, DType::i8, DType::e4m3, DType::e5m2}, {1, 2, 4});
  const int64_t num_seqs = in.number(0, 4), table_width = in.number(0, 4);
  const HostTensor tables = in.tensor(kI32, {num_seqs, table_width}, true), lens = in.tensor(kI32, {num_seqs}, true);
  HostTensor starts;
  if (in.flag()) starts = in.tensor(kI32, {num_seqs}, true);
  int64_t max_len = 0;
  if (!in.rude) {
    for (int64_t b = 0; b < num_seqs; ++b) {
      const int64_t len = in.number(0, table_width * cache.block_size), start = starts.defined() ? in.number(0, 5) : 0;
      lens.item<int32_t>(b) = static_cast<int32_t>(len);
      if (starts.defined()) starts.item<int32_t>(b) = static_cast<int32_t>(start);
      max_len = std::max(max_len, start + len);
      for (int64_t m = 0; m < table_width; ++m) {
        const bool kept = m * cache.block_size < len;
        tables.item<int32_t>(b, m) =
            static_cast<int32_t>(!kept                     ? in.random()
                                 : in.random_below(8) == 0 ? -1 - in.random_below(1 << 20)
                                                           : in.random_below(cache.num_blocks + 1) - 1);
      }
    }
    max_len += in.number(0, 3);
    for (const HostTensor* t : {&tables, &lens, static_cast<const HostTensor*>(&starts)})
      if (t->defined()) in.corrupt<int32_t>(*t);
    if (cache.scales.defined() && cache.scales_rank < 4) in.corrupt<float>(cache.scales);
  }
  if (in.rude || (in.corrupting && in.once_in(3))) max_len = in.flag() ? in.number(-2, 99) : in.anything<int64_t>();

  Call call;
  call.tensor(cache.cache);
  call.tensor(tables);
  call.tensor(lens);
  call.integer(max_len);
  call.optional_tensor(cache.scales);
  call.optional_tensor(starts);
  const std::vector<HostTensor> results = results_of(call, in, "gather_cache", 2);
  if (results.empty() || in.rude) return;
  if (results[1].numel() != 0 && cache.latent) found("a latent cache has no values to gather");
  for (int64_t plane = 0; plane < cache.planes; ++plane)
    for (int64_t b = 0; b < num_seqs; ++b)
      for (int64_t h = 0; h < cache.num_kv_heads; ++h)
        for (int64_t column = 0; column < max_len; ++column) {
          const int64_t j = column - (starts.defined() ? starts.item<int32_t>(b) : 0);
          const bool live = j >= 0 && j < lens.item<int32_t>(b);
          const int64_t block = live ? tables.item<int32_t>(b, j / cache.block_size) : -1,
                        offset = j % cache.block_size;
          const int64_t place = block >= 0 ? cache.cache.at(plane, block, h, offset) : 0;
          const float scale = block >= 0 ? cache.scale_at(plane, block, h, offset) : 0;
          const int64_t row = results[plane].at(b, h, column);
          for (int64_t d = 0; d < cache.stored_dim; ++d) {
            const auto type = static_cast<DType>(results[plane].type);
            const double got = number_at(type, results[plane].data(), row + d);
            const double want =
                block < 0 ? 0.0 : static_cast<float>(number_at(cache.dtype, cache.cache.data(), place + d)) * scale;
            if (got != want) found("an element of what was gathered");
          }
        }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return one_execution(data, size, gather); }
