// copy_blocks: every byte of the cache and of its scales after the call.
#include "caches.h"

using namespace torch_paged;
using namespace torch_paged::fuzz;

namespace {

HostTensor block_ids(Input& in, int64_t num_pairs) { return in.tensor(in.flag() ? kI64 : kI32, {num_pairs}, true); }

int64_t id_at(const HostTensor& ids, int64_t i) {
  return ids.type == kI64 ? ids.item<int64_t>(i) : ids.item<int32_t>(i);
}
void set_id(const HostTensor& ids, int64_t i, int64_t id) {
  if (ids.type == kI64)
    ids.item<int64_t>(i) = id;
  else
    ids.item<int32_t>(i) = static_cast<int32_t>(id);
}
void corrupt(Input& in, const HostTensor& ids) {
  if (ids.type == kI64)
    in.corrupt<int64_t>(ids);
  else
    in.corrupt<int32_t>(ids);
}

void copy(Input& in) {
  const CacheProblem cache(in, {DType::f32, DType::bf16, DType::f16, DType::i8, DType::e4m3, DType::e5m2}, {1, 2, 4});
  const int64_t num_pairs = in.number(0, 9);
  const HostTensor from = block_ids(in, num_pairs), to = block_ids(in, num_pairs);
  if (!in.rude) {
    std::vector<bool> taken(cache.num_blocks);
    for (int64_t i = 0; i < num_pairs; ++i) {
      const int64_t source = in.number(-1, cache.num_blocks - 1), target = in.number(-1, cache.num_blocks - 1);
      set_id(from, i, source);
      set_id(to, i, target >= 0 && taken[target] ? -1 : target);
      if (target >= 0) taken[target] = true;
    }
    corrupt(in, from);
    corrupt(in, to);
  }
  const Expected rows(cache.cache), scales(cache.scales);
  Call call;
  call.tensor(cache.cache);
  call.tensor(from);
  call.tensor(to);
  call.optional_tensor(cache.scales);
  const Expected rows_before(cache.cache), scales_before(cache.scales);
  const bool accepted = was_accepted(call, in, "copy_blocks");
  if (accepted && in.rude) return;
  for (int64_t i = 0; accepted && i < num_pairs; ++i) {
    const int64_t source = id_at(from, i), target = id_at(to, i);
    if (source < 0 || target < 0) continue;
    cache.for_each_row([&](int64_t plane, int64_t block, int64_t head, int64_t offset) {
      if (block != target) return;
      std::memcpy(rows.row(cache.cache.at(plane, target, head, offset)),
                  rows_before.row(cache.cache.at(plane, source, head, offset)),
                  cache.stored_dim * bytes_of(cache.cache.type));
      if (cache.scales_rank == 4)
        std::memcpy(scales.row(cache.scales.at(plane, target, head, offset)),
                    scales_before.row(cache.scales.at(plane, source, head, offset)), 4);
    });
  }
  rows.check(accepted ? "the cache after a copy" : "a refused copy changed the cache");
  scales.check(accepted ? "the scales after a copy" : "a refused copy changed the scales");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) { return one_execution(data, size, copy); }
