// Cuts an attention call into work items and runs them.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "parallel.h"
#include "plan.h"

namespace torch_paged {

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

class Workspace {
 public:
  Workspace() = default;
  Workspace(Workspace&& other) noexcept { *this = std::move(other); }
  Workspace& operator=(Workspace&& other) noexcept {
    memory_ = std::move(other.memory_);
    size_ = std::exchange(other.size_, 0);
    return *this;
  }

  char* get(int64_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      size_ = round_up(bytes, 4096);
      memory_.reset(static_cast<char*>(std::aligned_alloc(4096, size_)));
      if (!memory_) {
        size_ = 0;
        throw std::bad_alloc();
      }
    }
    return memory_.get();
  }

 private:
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
};

#if !defined(TORCH_PAGED_LONG_WORK_BYTES)
#define TORCH_PAGED_LONG_WORK_BYTES (int64_t{1} << 28)
#endif
constexpr int64_t kLongWorkBytes = TORCH_PAGED_LONG_WORK_BYTES;  // that may take longer than a user waits: 0.1 s

struct Plan {
  std::vector<Sequence> sequences;
  std::vector<Item> items, divided;  // before and after their kv heads are divided
  std::vector<int64_t> merges;       // sequences with partial results
  int64_t partial_rows, direct_rows, tile_rows;
  int64_t work_bytes;
  int threads;

  void clear() {
    sequences.clear();
    items.clear();
    divided.clear();
    merges.clear();
    partial_rows = direct_rows = tile_rows = work_bytes = 0;
    threads = 1;
  }
};

// The keys that some query of [begin, begin + count) sees.
Interval hull(const AttentionArgs& args, const Sequence& seq, int64_t begin, int64_t count) {
  Interval all{seq.kv_len(), 0};
  const auto add = [&](int64_t token) {
    const Interval keys = visible_keys(args, query_position(args, seq, token), seq.kv_len());
    if (keys.lo >= keys.hi) return;
    all.lo = std::min(all.lo, keys.lo);
    all.hi = std::max(all.hi, keys.hi);
  };
  if (args.query_positions) {
    for (int64_t t = begin; t < begin + count; ++t) add(t);
  } else {
    // Positions grow by one: both ends of the interval grow with them, except that the first rows may see nothing.
    const int64_t first = std::max(begin, seq.query_len - seq.kv_len());
    if (first < begin + count) add(first);
    add(begin);
    add(begin + count - 1);
  }
  if (all.lo > all.hi) all.lo = all.hi = 0;
  return all;
}

Sequence make_sequence(const AttentionArgs& args, int64_t b) {
  Sequence seq;
  seq.query_begin = args.decode ? b : args.cu_seqlens_q[b];
  seq.query_len = args.decode ? 1 : args.cu_seqlens_q[b + 1] - seq.query_begin;
  if (args.has_cache) {
    seq.context_len = args.context_lens[b];
    seq.table = args.block_tables + b * args.table_stride;
  }
  if (args.has_new) {
    seq.new_begin = args.cu_seqlens_k[b];
    seq.new_len = args.cu_seqlens_k[b + 1] - seq.new_begin;
  }
  return seq;
}

void make_plan(const AttentionArgs& args, Plan& plan) {
  plan.clear();
  const int64_t group = args.num_heads / args.num_kv_heads, heads = args.num_kv_heads;
  const int64_t key_bytes =
      (args.head_dim + args.value_dim) * element_size(args.has_cache ? args.cache.dtype : args.dtype);
  plan.sequences.reserve(args.num_seqs);
  int64_t direct_splits = 0;
  for (int64_t b = 0; b < args.num_seqs; ++b) {
    Sequence seq = make_sequence(args, b);
    const int64_t rows = seq.query_len * group;
    const bool direct = rows <= kMaxDirectRows;
    const int64_t tile_tokens = std::max<int64_t>(1, kTileRows / group);
    const int64_t split_keys = direct ? kSplitKeysDirect : seq.query_len <= tile_tokens ? kSplitKeysTile : 0;
    if (split_keys > 0 && seq.query_len > 0) {
      const Interval keys = hull(args, seq, 0, seq.query_len);
      const int64_t first = keys.lo / split_keys, last = (keys.hi + split_keys - 1) / split_keys;
      seq.num_splits = std::max<int64_t>(1, last - first);
      if (seq.num_splits > 1) {
        seq.partial_begin = plan.partial_rows;
        plan.partial_rows += seq.num_splits * heads * rows;
        plan.merges.push_back(b);
      }
      for (int64_t i = 0; i < seq.num_splits; ++i) {
        Item item;
        item.seq = b;
        item.head_end = heads;
        item.num_tokens = seq.query_len;
        item.key_begin = (first + i) * split_keys;
        item.key_end = std::max(item.key_begin, std::min(keys.hi, item.key_begin + split_keys));
        item.partial = seq.num_splits > 1 ? seq.partial_begin + i * heads * rows : -1;
        item.tile = !direct;
        plan.items.push_back(item);
        plan.work_bytes += (item.key_end - std::max(keys.lo, item.key_begin)) * heads * key_bytes * (direct ? 1 : rows);
      }
      direct_splits += direct ? seq.num_splits : 0;
    } else {
      for (int64_t t = 0; t < seq.query_len; t += tile_tokens) {
        Item item;
        item.seq = b;
        item.head_end = heads;
        item.token_begin = t;
        item.num_tokens = std::min(tile_tokens, seq.query_len - t);
        const Interval keys = hull(args, seq, t, item.num_tokens);
        item.key_begin = keys.lo;
        item.key_end = keys.hi;
        item.tile = true;
        plan.items.push_back(item);
        plan.work_bytes += (keys.hi - keys.lo) * heads * key_bytes * item.num_tokens * group;
      }
    }
    plan.sequences.push_back(seq);
  }

  // Divide the kv heads of an item, as far as the threads need. Heads are independent sums.
  plan.threads = threads_for(plan.work_bytes);
  const int64_t wanted = plan.threads > 1 ? 4 * plan.threads : 1;
  const int64_t pieces =
      std::min(heads, std::max<int64_t>(1, (wanted + direct_splits - 1) / std::max<int64_t>(1, direct_splits)));
  const auto cost = [](const Item& i) { return i.tile ? (i.key_end - i.key_begin) * i.num_tokens : 0; };
  int64_t tile_cost = 0;
  for (const Item& item : plan.items) tile_cost += cost(item);
  const int64_t largest_cost = tile_cost / (2 * wanted) + 1;  // of a part
  for (const Item& item : plan.items) {
    const int64_t tile_pieces = plan.threads > 1 ? std::min(heads, cost(item) / largest_cost + 1) : 1;
    const int64_t parts = item.tile ? tile_pieces : pieces;
    const int64_t rows = item.num_tokens * group;
    for (int64_t i = 0; i < parts; ++i) {
      Item part = item;
      part.head_begin = heads * i / parts;
      part.head_end = heads * (i + 1) / parts;
      if (item.tile)
        plan.tile_rows = std::max(plan.tile_rows, rows);
      else
        plan.direct_rows = std::max(plan.direct_rows, rows * (part.head_end - part.head_begin));
      plan.divided.push_back(part);
    }
  }
  // The longest first, so that no thread is left alone with one at the end.
  if (plan.tile_rows == 0) return;
  std::stable_sort(plan.divided.begin(), plan.divided.end(), [&](const Item& x, const Item& y) {
    return cost(x) * (x.head_end - x.head_begin) > cost(y) * (y.head_end - y.head_begin);
  });
}

// Rows that belong to no sequence.
void clear_padding(const AttentionArgs& args) {
  const int64_t begin = args.decode ? args.num_seqs : args.cu_seqlens_q[args.num_seqs];
  const int64_t rows = (args.num_tokens - begin) * args.num_heads;
  if (rows == 0) return;
  const int64_t row_bytes = args.value_dim * element_size(args.dtype), first = begin * args.num_heads;
  std::memset(static_cast<char*>(args.out) + first * row_bytes, 0, rows * row_bytes);
  constexpr float kNegInf = -__builtin_inff();
  if (args.lse) std::fill_n(args.lse + first, rows, kNegInf);
  if (args.max_logits) std::fill_n(args.max_logits + first, rows, kNegInf);
}

}  // namespace

void attention(const AttentionArgs& args) {
  const KernelTable& isa = kernels();
  clear_padding(args);
  static thread_local Plan kept_plan;
  Loan<Plan> planned(kept_plan);
  Plan& plan = *planned;
  make_plan(args, plan);
  const int64_t scratch_bytes = isa.attention_scratch_bytes(args, plan.direct_rows, plan.tile_rows);
  const int64_t lanes = acc_dim(args);

  static thread_local Workspace kept_partials;
  Loan<Workspace> partial_memory(kept_partials);
  Partials partials;
  if (plan.partial_rows > 0) {
    const int64_t bytes = plan.partial_rows * (lanes + 2) * sizeof(float);
    partials.acc = reinterpret_cast<float*>((*partial_memory).get(bytes));
    partials.max = partials.acc + plan.partial_rows * lanes;
    partials.sum = partials.max + plan.partial_rows;
  }
  std::optional<Stop> stop;
  if (args.poll && plan.work_bytes >= kLongWorkBytes) stop.emplace(args.poll);
  const auto run_item = [&](int64_t i) {
    static thread_local Workspace kept_scratch;
    Loan<Workspace> scratch(kept_scratch);
    const Item& item = plan.divided[i];
    char* const memory = (*scratch).get(scratch_bytes);
    isa.attention_item(args, plan.sequences[item.seq], item, partials, memory, stop ? &*stop : nullptr);
  };
  if (stop)
    parallel_for(plan.divided.size(), plan.threads, run_item, *stop);
  else
    parallel_for(plan.divided.size(), plan.threads, run_item);
  const int64_t heads = args.num_kv_heads;
  parallel_for(plan.merges.size() * heads, plan.threads, [&](int64_t i) {
    isa.attention_merge(args, plan.sequences[plan.merges[i / heads]], i % heads, partials);
  });
}

}  // namespace torch_paged
