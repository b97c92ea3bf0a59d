// The kernels' parallel loops, in calls that are large enough to be shared: the same bits with one thread and with
// several, alone and from two threads of the program at once, also next to calls that a poll ends early and after them.
// For ThreadSanitizer: parallel.h then runs plain threads. To be built so that every call of attention polls
// (TORCH_PAGED_LONG_WORK_BYTES) and soon (TORCH_PAGED_POLL_MS).
// With the argument "race" one call gives a slot to many tokens, which lets threads write the same bytes: what watches
// the threads must report it.
#include <omp.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "parallel.h"
#include "params.h"

using namespace torch_paged;

namespace {

constexpr int64_t kSeqs = 3, kContext = 1500, kKvHeads = 2, kHeads = 8, kDim = 32, kBlockSize = 16;
constexpr int64_t kEntries = (kContext + kBlockSize - 1) / kBlockSize, kBlocks = 2 * kSeqs * kEntries;
constexpr int64_t kSlots = kBlocks * kBlockSize, kTokens = kSeqs * kContext, kPrompt = 300, kParts = 3;

using Floats = std::vector<float>;

thread_local int threads_now = 1;

// What a poll throws. Polls before it does, on this thread; negative: it never does.
struct Ended {};
thread_local int polls_left = -1;

void poll() {
  if (polls_left == 0) throw Ended();
  if (polls_left > 0) --polls_left;
}

Floats numbers(int64_t count, unsigned seed) {
  std::mt19937 random(seed);
  Floats all(count);
  for (float& x : all) x = static_cast<float>(static_cast<int>(random() % 127) - 63) / 32;
  return all;
}

Cache view(Floats& data) {
  Cache cache;
  cache.data = data.data();
  cache.num_blocks = kBlocks, cache.num_kv_heads = kKvHeads;
  cache.block_size = kBlockSize, cache.stored_dim = kDim;
  cache.stride_token = kDim;
  cache.stride_head = kBlockSize * kDim;
  cache.stride_block = kKvHeads * cache.stride_head;
  cache.stride_kv = kBlocks * cache.stride_block;
  return cache;
}

// What calls only read: token t of sequence b lies in the slot of the same number, counted over all sequences.
struct Shared {
  Floats cache = numbers(2 * kSlots * kKvHeads * kDim, 1), query = numbers(kSeqs * kPrompt * kHeads * kDim, 2);
  Floats rows = numbers(kTokens * kKvHeads * kDim, 3), parts = numbers(kParts * kPrompt * kHeads * kDim, 4);
  Floats weights = numbers(kParts * kPrompt * kHeads, 5);
  std::vector<int32_t> tables, lens, cu;
  std::vector<int64_t> slots, from, to;

  Shared() {
    for (int64_t b = 0; b < kSeqs; ++b) lens.push_back(kContext);
    for (int64_t b = 0; b <= kSeqs; ++b) cu.push_back(static_cast<int32_t>(b * kPrompt));
    for (int64_t i = 0; i < kSeqs * kEntries; ++i) tables.push_back(static_cast<int32_t>(i));
    for (int64_t t = 0; t < kTokens; ++t) slots.push_back(t / kContext * kEntries * kBlockSize + t % kContext);
    for (int64_t i = 0; i + 1 < kSeqs * kEntries; ++i) {  // each block moves on by one: sources are overwritten
      from.push_back(i);
      to.push_back(i + 1);
    }
  }
};

void attend(Shared& shared, bool decode, Floats& out, Floats& lse) {
  const int64_t tokens = decode ? kSeqs : kSeqs * kPrompt;
  out.assign(tokens * kHeads * kDim, NAN);
  lse.assign(tokens * kHeads, NAN);
  AttentionArgs args;
  args.num_tokens = tokens, args.num_seqs = kSeqs;
  args.num_heads = kHeads, args.num_kv_heads = kKvHeads;
  args.head_dim = args.value_dim = kDim;
  args.query = {shared.query.data(), kHeads * kDim, kDim};
  args.out = out.data();
  args.lse = lse.data();
  args.has_cache = true;
  args.cache = view(shared.cache);
  args.block_tables = shared.tables.data(), args.table_stride = kEntries;
  args.context_lens = shared.lens.data();
  args.decode = decode;
  args.cu_seqlens_q = decode ? nullptr : shared.cu.data();
  args.causal = true;
  args.poll = poll;
  attention(args);
}

// Every kernel once; returns all that they wrote.
std::vector<Floats> run_all(Shared& shared) {
  std::vector<Floats> results(11);
  attend(shared, true, results[0], results[1]);
  attend(shared, false, results[2], results[3]);

  results[4].assign(2 * kSlots * kKvHeads * kDim, NAN);
  // A sequence at a time: ThreadSanitizer does not see the stores past the caches of a larger call.
  CacheWriteArgs write;
  write.num_tokens = kContext;
  write.head_dim = write.value_dim = kDim;
  write.cache = view(results[4]);
  for (int64_t first = 0; first < kTokens; first += kContext) {
    write.key = write.value = {shared.rows.data() + first * kKvHeads * kDim, kKvHeads * kDim, kDim};
    write.slots = shared.slots.data() + first;
    write_cache(write);
  }
  copy_blocks(write.cache, shared.from.data(), shared.to.data(), static_cast<int64_t>(shared.from.size()));

  results[9].assign(2 * kSlots * kKvHeads * kDim / sizeof(float), NAN);  // int8
  results[10].assign(2 * kSlots * kKvHeads, NAN);
  CacheWriteArgs quantize;
  quantize.num_tokens = kTokens;
  quantize.head_dim = quantize.value_dim = kDim;
  quantize.key = quantize.value = {shared.rows.data(), kKvHeads * kDim, kDim};
  quantize.slots = shared.slots.data();
  quantize.cache = view(results[9]);
  quantize.cache.dtype = DType::i8;
  quantize.cache.scales = results[10].data();
  quantize.cache.scales_rank = 4;
  quantize.cache.scale_stride_token = 1;
  quantize.cache.scale_stride_head = kBlockSize;
  quantize.cache.scale_stride_block = kKvHeads * kBlockSize;
  quantize.cache.scale_stride_kv = kSlots * kKvHeads;
  quantize.compute_scales = true;
  write_cache(quantize);

  GatherArgs gather;
  gather.cache = view(shared.cache);
  gather.block_tables = shared.tables.data(), gather.table_stride = kEntries;
  gather.context_lens = shared.lens.data();
  gather.num_seqs = kSeqs, gather.max_len = kContext + 5;
  for (Floats* dense : {&results[5], &results[6]}) dense->assign(kSeqs * kKvHeads * gather.max_len * kDim, NAN);
  gather.key = results[5].data();
  gather.value = results[6].data();
  gather_cache(gather);

  MergeArgs merge;
  merge.num_parts = kParts, merge.num_tokens = kPrompt, merge.num_heads = kHeads, merge.head_dim = kDim;
  merge.outs = shared.parts.data();
  merge.lses = shared.weights.data();
  results[7].assign(kPrompt * kHeads * kDim, NAN);
  results[8].assign(kPrompt * kHeads, NAN);
  merge.out = results[7].data();
  merge.lse = results[8].data();
  merge_attention_states(merge);
  return results;
}

bool same(const std::vector<Floats>& a, const std::vector<Floats>& b) {
  for (size_t i = 0; i < a.size(); ++i)
    if (a[i].size() != b[i].size() || std::memcmp(a[i].data(), b[i].data(), 4 * a[i].size()) != 0) return false;
  return true;
}

// Attention whose polls end it, the sooner the smaller `allowed`; returns whether they did.
bool is_ended(Shared& shared, bool decode, int allowed) {
  Floats out, lse;
  polls_left = allowed;
  bool ended = false;
  try {
    attend(shared, decode, out, lse);
  } catch (const Ended&) {
    ended = true;
  }
  polls_left = -1;
  return ended;
}

// Whether what a piece of work throws on a thread of the team, any of them, reaches the one that called.
bool reaches_the_caller(int thrower) {
  Stop stop(poll);
  try {
    parallel_for(
        64, threads_now,
        [&](int64_t i) {
          if (i == thrower) throw Ended();
          std::this_thread::sleep_for(std::chrono::microseconds(300));
        },
        stop);
  } catch (const Ended&) {
    return stop.look();
  }
  return false;
}

// Calls that end early, with one thread and with four.
bool end_early(Shared& shared) {
  bool good = true;
  for (int threads : {1, 4}) {
    threads_now = threads;
    int ended = 0;
    for (int allowed : {0, 1, 3, 10}) ended += is_ended(shared, false, allowed);
    is_ended(shared, true, 0);  // may be over before it polls
    good = ended > 0 && good;
  }
  for (int thrower : {0, 1, 2, 3, 40}) good = reaches_the_caller(thrower) && good;
  return good;
}

}  // namespace

int omp_in_parallel() { return 0; }
int omp_get_max_threads() { return threads_now; }

int main(int argc, char** argv) {
  Shared shared;
  if (argc > 1 && std::string(argv[1]) == "race")
    for (size_t t = 0; t < shared.slots.size(); t += 32) shared.slots[t] = 0;
  threads_now = 1;
  const std::vector<Floats> expected = run_all(shared);
  threads_now = 4;
  bool good = same(run_all(shared), expected);
  std::vector<Floats> other;
  bool others_ended = false;
  std::thread beside([&] {
    others_ended = end_early(shared);
    threads_now = 4;
    other = run_all(shared);
  });
  good = same(run_all(shared), expected) && good;
  const bool ended = end_early(shared);
  good = same(run_all(shared), expected) && good;
  beside.join();
  good = same(other, expected) && good;
  if (!ended || !others_ended) {
    std::printf("FAILED: calls that a poll or a piece of work ends did not end\n");
    return 1;
  }
  std::printf(good ? "the same bits with four threads, twice at once\n" : "FAILED: other bits with four threads\n");
  return good ? 0 : 1;
}
