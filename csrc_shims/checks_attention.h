// The rules of the two attention ops that go beyond one tensor: which arguments belong together, scalars, and the
// values of lengths and of block ids in used table entries.
#pragma once

#include <algorithm>
#include <limits>

#include "checks.h"

namespace torch_paged {

// The arguments of an attention op. Absent tensors are not defined; paged_attention has no key, value and cu_seqlens.
struct AttentionCall {
  const char* op = "";
  Tensor query, key, value, cu_seqlens_q, cu_seqlens_k, kv_cache, block_tables, context_lens;
  int64_t max_seqlen_q = 0, max_seqlen_k = 0;
  Tensor kv_scales, sinks, alibi_slopes, attn_mask, query_positions;
  std::optional<double> softmax_scale;
  double logits_soft_cap = 0.0;
  bool causal = false;
  std::optional<int64_t> sliding_window, attention_chunk, value_dim;
};

inline void check_given_together(const char* op, const Tensor& t, const Tensor& leader) {
  if (t.defined() == leader.defined()) return;
  fail(op, t.name, std::string(leader.defined() ? "be given with " : "be None without ") + leader.name,
       show_presence(t));
}

inline void check_sources(const AttentionCall& call) {
  if (!call.key.defined() && !call.kv_cache.defined()) fail(call.op, "key", "be given without kv_cache", "None");
  if (!call.key.defined() && call.value.defined()) {
    fail(call.op, "value", "be None without key", show_presence(call.value));
  }
  check_given_together(call.op, call.cu_seqlens_k, call.key);
  check_given_together(call.op, call.block_tables, call.kv_cache);
  check_given_together(call.op, call.context_lens, call.kv_cache);
  if (!call.kv_cache.defined() && call.kv_scales.defined()) {
    fail(call.op, "kv_scales", "be None without kv_cache", show_presence(call.kv_scales));
  }
}

inline void check_mask(Shapes& shapes, const Tensor& mask, Dim rows) {
  if (!mask.defined()) return;
  shapes.check_type(mask, kBool);
  const bool heads_fit =
      mask.rank == 2 || (mask.rank == 3 && (mask.size(0) == shapes[Dim::H] || mask.size(0) == shapes[Dim::KH]));
  if (heads_fit && mask.size(mask.rank - 2) == shapes[rows]) return;
  const std::string t = rows == Dim::T ? "T" : "B";
  fail(shapes.op, mask.name,
       "have shape (" + t + ", C), (KH, " + t + ", C) or (H, " + t + ", C) with " + t + " = " + show(shapes[rows]) +
           ", KH = " + show(shapes[Dim::KH]) + " and H = " + show(shapes[Dim::H]),
       show_shape(mask));
}

// Shapes, dtypes and scalars. Everything here is also true of tensors without data.
inline void check_attention(const AttentionCall& call, Shapes& shapes, bool varlen) {
  const char* op = call.op;
  const Dim rows = varlen ? Dim::T : Dim::B;
  check_sources(call);
  if (varlen) {
    shapes.check(call.query, kFloats, {Dim::T, Dim::H, Dim::D});
  } else {
    shapes.check(call.query, kFloats, {Dim::B, Dim::H, Dim::D});
  }
  shapes.check(call.key, 0, {Dim::Tk, Dim::KH, Dim::D}, &call.query);
  shapes.check(call.value, 0, {Dim::Tk, Dim::KH, Dim::DV}, &call.query);
  shapes.check(call.cu_seqlens_q, kInt32, {Dim::Bp1});
  shapes.check(call.cu_seqlens_k, kInt32, {Dim::Bp1});
  shapes.check(call.kv_cache, kQuantized, {Dim::two, Dim::N, Dim::KH, Dim::S, Dim::DS}, &call.query);
  shapes.check(call.block_tables, kInt32, {Dim::B, Dim::M});
  shapes.check(call.context_lens, kInt32, {Dim::B});
  check_scales(shapes, call.kv_scales, ScalesRank::any);
  shapes.check(call.sinks, kFloat32, {Dim::H});
  shapes.check(call.alibi_slopes, kFloat32, {Dim::H});
  check_mask(shapes, call.attn_mask, rows);
  shapes.check(call.query_positions, kInt32, {Dim::T});

  const int64_t head_dim = shapes[Dim::D];
  const bool latent = call.kv_cache.defined() ? shapes[Dim::two] == 1 : !call.value.defined();
  if (shapes[Dim::H] % shapes[Dim::KH] != 0) {
    fail(op, "query", "have H a multiple of KH = " + show(shapes[Dim::KH]), "H = " + show(shapes[Dim::H]));
  }
  if (call.kv_cache.defined()) {
    if (shapes[Dim::DS] < head_dim) {
      fail(op, "kv_cache", "have DS >= D = " + show(head_dim), "DS = " + show(shapes[Dim::DS]));
    }
    check_cache_strides(op, call.kv_cache);
    check_scales_presence(op, call.kv_cache, call.kv_scales);
  }
  if (call.key.defined() && call.kv_cache.defined() && latent == call.value.defined()) {
    fail(op, "value", latent ? "be None for a latent kv_cache" : "be given with key unless kv_cache is latent",
         show_presence(call.value));
  }
  if (call.value.defined() && shapes[Dim::DV] > head_dim) {
    fail(op, "value", "have DV <= D = " + show(head_dim), "DV = " + show(shapes[Dim::DV]));
  }
  if (latent && !call.value_dim) fail(op, "value_dim", "be given when the values are lanes of the keys", "None");
  const int64_t widest = call.value.defined() ? shapes[Dim::DV] : head_dim;
  if (call.value_dim && (*call.value_dim < 1 || *call.value_dim > widest)) {
    fail(op, "value_dim", std::string("lie in [1, ") + (call.value.defined() ? "DV" : "D") + " = " + show(widest) + "]",
         show(*call.value_dim));
  }
  if (varlen && call.max_seqlen_q < 0) fail(op, "max_seqlen_q", "be >= 0", show(call.max_seqlen_q));
  if (varlen && call.max_seqlen_k < 0) fail(op, "max_seqlen_k", "be >= 0", show(call.max_seqlen_k));
  // Kernels compute in float32, where a smaller cap would round to 0, which means "off", or have no finite inverse.
  constexpr double kSmallest = std::numeric_limits<float>::min(), kLargest = std::numeric_limits<float>::max();
  if (call.softmax_scale && !(std::abs(*call.softmax_scale) <= kLargest)) {
    fail(op, "softmax_scale", "be finite in float32", show_real(*call.softmax_scale));
  }
  if (call.logits_soft_cap != 0.0 && !(call.logits_soft_cap >= kSmallest && call.logits_soft_cap <= kLargest)) {
    fail(op, "logits_soft_cap", "be 0 or a positive normal float32", show_real(call.logits_soft_cap));
  }
  if (call.sliding_window && *call.sliding_window < 1) {
    fail(op, "sliding_window", "be None or >= 1", show(*call.sliding_window));
  }
  if (call.attention_chunk && *call.attention_chunk < 1) {
    fail(op, "attention_chunk", "be None or >= 1", show(*call.attention_chunk));
  }
}

inline void check_cu_seqlens(const char* op, const char* name, const int32_t* cu, int64_t num_seqs, int64_t limit,
                             const char* letter) {
  if (cu[0] != 0) fail(op, name, "start with 0", show(cu[0]) + " at index 0");
  for (int64_t b = 1; b <= num_seqs; ++b) {
    if (cu[b] < cu[b - 1]) {
      fail(op, name, "not decrease", show(cu[b]) + " after " + show(cu[b - 1]) + " at index " + show(b));
    }
  }
  if (cu[num_seqs] > limit) {
    fail(op, name, std::string("end at or before ") + letter + " = " + show(limit),
         show(cu[num_seqs]) + " at index " + show(num_seqs));
  }
}

inline void check_context_lens(const char* op, const int32_t* context_lens, int64_t num_seqs, int64_t table_columns,
                               int64_t block_size) {
  int64_t capacity;  // of views with strides of 0 it may exceed 64 bits, and then bounds no int32
  if (__builtin_mul_overflow(table_columns, block_size, &capacity)) capacity = std::numeric_limits<int32_t>::max();
  check_indices(op, "context_lens", context_lens, num_seqs, 0, capacity + 1,
                [&] { return "[0, M * S = " + show(capacity) + "]"; });
}

// Block ids of the entries that hold keys [first_key, last_key] of a sequence.
class UsedEntries {
 public:
  UsedEntries(const AttentionArgs& args, const char* op) : args_(args), op_(op) {}

  void check(int64_t seq) {
    const int64_t context = args_.context_lens[seq];
    const int64_t query_begin = args_.decode ? seq : args_.cu_seqlens_q[seq];
    const int64_t query_len = args_.decode ? 1 : args_.cu_seqlens_q[seq + 1] - query_begin;
    if (context == 0 || query_len == 0) return;
    if (args_.sliding_window == 0 && args_.attention_chunk == 0) return check_keys(seq, 0, context - 1);
    if (args_.query_positions == nullptr) {
      const int64_t new_len = args_.has_new ? args_.cu_seqlens_k[seq + 1] - args_.cu_seqlens_k[seq] : 0;
      const int64_t last = context + new_len - 1;
      return check_keys(seq, first_key(last - query_len + 1), std::min(last_key(last), context - 1));
    }
    // Given positions may leave gaps: count how many queries open each entry.
    const int64_t entries = (context + args_.cache.block_size - 1) / args_.cache.block_size;
    opened_.assign(static_cast<size_t>(entries) + 1, 0);
    for (int64_t i = query_begin; i < query_begin + query_len; ++i) {
      const int64_t first = std::max<int64_t>(first_key(args_.query_positions[i]), 0);
      const int64_t last = std::min(last_key(args_.query_positions[i]), context - 1);
      if (first > last) continue;
      opened_[static_cast<size_t>(first / args_.cache.block_size)] += 1;
      opened_[static_cast<size_t>(last / args_.cache.block_size) + 1] -= 1;
    }
    int64_t open = 0;
    for (int64_t entry = 0; entry < entries; ++entry) {
      open += opened_[static_cast<size_t>(entry)];
      if (open > 0) check_entries(seq, entry, entry + 1);
    }
  }

 private:
  const AttentionArgs& args_;
  const char* op_;
  std::vector<int64_t> opened_;

  int64_t first_key(int64_t position) const {
    int64_t first = INT64_MIN;
    if (args_.sliding_window > 0) first = position - args_.sliding_window + 1;
    if (args_.attention_chunk > 0) {
      int64_t chunk = position / args_.attention_chunk;
      chunk -= position % args_.attention_chunk < 0 ? 1 : 0;
      first = std::max(first, chunk * args_.attention_chunk);
    }
    return first;
  }
  int64_t last_key(int64_t position) const {
    return args_.causal || args_.attention_chunk > 0 ? position : position + args_.sliding_window - 1;
  }

  void check_keys(int64_t seq, int64_t first, int64_t last) const {
    first = std::max<int64_t>(first, 0);
    if (first <= last) check_entries(seq, first / args_.cache.block_size, last / args_.cache.block_size + 1);
  }

  void check_entries(int64_t seq, int64_t begin, int64_t end) const {
    const int32_t* row = args_.block_tables + seq * args_.table_stride;
    const auto num_blocks = static_cast<uint64_t>(args_.cache.num_blocks);
    bool broken = false;
    for (int64_t m = begin; m < end; ++m) broken |= static_cast<uint64_t>(static_cast<int64_t>(row[m])) >= num_blocks;
    if (broken) fail_entry(seq, row, begin, num_blocks);
  }

  [[noreturn, gnu::noinline, gnu::cold]] void fail_entry(int64_t seq, const int32_t* row, int64_t begin,
                                                         uint64_t num_blocks) const {
    int64_t m = begin;
    while (static_cast<uint64_t>(static_cast<int64_t>(row[m])) < num_blocks) ++m;
    const int64_t index[2] = {seq, m};
    fail(op_, "block_tables", "lie in [0, N = " + show(args_.cache.num_blocks) + ") where used",
         show(row[m]) + " at index " + show_tuple(index, 2));
  }
};

// Tokens of each sequence.
struct SequenceLengths {
  const AttentionArgs& args;

  int64_t queries(int64_t seq) const { return args.decode ? 1 : args.cu_seqlens_q[seq + 1] - args.cu_seqlens_q[seq]; }
  int64_t keys(int64_t seq) const {
    const int64_t new_len = args.has_new ? args.cu_seqlens_k[seq + 1] - args.cu_seqlens_k[seq] : 0;
    return new_len + (args.has_cache ? args.context_lens[seq] : 0);
  }
};

// Says which of the three rules is broken, in their order, and by which sequence first.
[[noreturn, gnu::noinline, gnu::cold]] inline void fail_lengths(const AttentionArgs& args, const AttentionCall& call,
                                                                const SequenceLengths& lengths) {
  const auto less_than = [](int64_t length, int64_t seq) {
    return ", less than " + show(length) + " at index " + show(seq);
  };
  for (int64_t b = 0; !args.decode && b < args.num_seqs; ++b) {
    if (lengths.queries(b) <= call.max_seqlen_q) continue;
    fail(call.op, "max_seqlen_q", "be >= every query length",
         show(call.max_seqlen_q) + less_than(lengths.queries(b), b));
  }
  for (int64_t b = 0; !args.decode && b < args.num_seqs; ++b) {
    if (lengths.keys(b) <= call.max_seqlen_k) continue;
    fail(call.op, "max_seqlen_k", "be >= every kv length", show(call.max_seqlen_k) + less_than(lengths.keys(b), b));
  }
  int64_t b = 0;
  while (lengths.keys(b) <= args.mask_columns) ++b;
  fail(call.op, "attn_mask", "have C >= every kv length",
       "C = " + show(args.mask_columns) + less_than(lengths.keys(b), b));
}

// The data-dependent rules. `args` is complete but for its results.
inline void check_attention_values(const AttentionArgs& args, const AttentionCall& call, const Shapes& shapes) {
  const char* op = call.op;
  const int64_t num_seqs = args.num_seqs;
  if (!args.decode) check_cu_seqlens(op, "cu_seqlens_q", args.cu_seqlens_q, num_seqs, args.num_tokens, "T");
  if (args.has_new) check_cu_seqlens(op, "cu_seqlens_k", args.cu_seqlens_k, num_seqs, shapes[Dim::Tk], "Tk");
  if (args.has_cache) {
    check_context_lens(op, args.context_lens, num_seqs, shapes[Dim::M], args.cache.block_size);
    check_scale_values(op, call.kv_scales);
  }
  const SequenceLengths lengths{args};
  bool fits = true;
  for (int64_t b = 0; b < num_seqs; ++b) {
    const int64_t kv_len = lengths.keys(b);
    fits &= args.decode || (lengths.queries(b) <= call.max_seqlen_q && kv_len <= call.max_seqlen_k);
    fits &= !call.attn_mask.defined() || kv_len <= args.mask_columns;  // a mask without columns has no memory
  }
  if (!fits) fail_lengths(args, call, lengths);
  if (!args.has_cache) return;
  UsedEntries used(args, op);
  for (int64_t b = 0; b < num_seqs; ++b) used.check(b);
}

inline void check_gather_values(const GatherArgs& args, const char* op, const Tensor& kv_scales,
                                int64_t table_columns) {
  check_context_lens(op, args.context_lens, args.num_seqs, table_columns, args.cache.block_size);
  check_scale_values(op, kv_scales);
  for (int64_t b = 0; args.starts != nullptr && b < args.num_seqs; ++b) {
    if (args.starts[b] < 0) fail(op, "starts", "be >= 0", show(args.starts[b]) + " at index " + show(b));
  }
  for (int64_t b = 0; b < args.num_seqs; ++b) {
    const int64_t start = args.starts != nullptr ? args.starts[b] : 0;
    if (start + args.context_lens[b] > args.max_len) {
      fail(op, "max_len", "be >= every start plus context length",
           show(args.max_len) + ", less than " + show(start + args.context_lens[b]) + " at index " + show(b));
    }
  }
  for (int64_t b = 0; b < args.num_seqs; ++b) {
    const int32_t* row = args.block_tables + b * args.table_stride;
    const int64_t entries = (args.context_lens[b] + args.cache.block_size - 1) / args.cache.block_size;
    for (int64_t m = 0; m < entries; ++m) {
      if (row[m] < args.cache.num_blocks) continue;
      const int64_t index[2] = {b, m};
      fail(op, "block_tables", "be < N = " + show(args.cache.num_blocks) + " where used",
           show(row[m]) + " at index " + show_tuple(index, 2));
    }
  }
}

}  // namespace torch_paged
