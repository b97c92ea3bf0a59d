// Binds the CPU kernels to the ops: reads the arguments, checks them, allocates the results, fills the structs of
// cpu/params.h and calls. The ops themselves are defined from torch_paged/contract/schema.py.
#include <algorithm>

#include "checks_attention.h"
#include "python.h"

namespace torch_paged {
namespace {

// Windows and chunks beyond every possible distance of two int32 positions are as good as this one, and never overflow.
constexpr int64_t kWidest = int64_t{1} << 33;

Rows rows_of(const Tensor& t) {
  Rows rows;
  if (t.defined()) rows = {t.data<void>(), t.stride(0), t.stride(1)};
  return rows;
}

Cache cache_of(const Tensor& kv_cache, const Tensor& scales) {
  Cache cache;
  cache.data = kv_cache.data<void>();
  cache.dtype = kv_cache.dtype();
  cache.latent = kv_cache.size(0) == 1;
  cache.stride_kv = kv_cache.stride(0);
  cache.stride_block = kv_cache.stride(1);
  cache.stride_head = kv_cache.stride(2);
  cache.stride_token = kv_cache.stride(3);
  cache.num_blocks = kv_cache.size(1);
  cache.num_kv_heads = kv_cache.size(2);
  cache.block_size = kv_cache.size(3);
  cache.stored_dim = kv_cache.size(4);
  if (!scales.defined()) return cache;
  cache.scales = scales.data<float>();
  cache.scales_rank = static_cast<int>(scales.rank);
  cache.scale_stride_kv = scales.stride(0);
  if (scales.rank == 2) cache.scale_stride_head = scales.stride(1);
  if (scales.rank == 4) {
    cache.scale_stride_block = scales.stride(1);
    cache.scale_stride_head = scales.stride(2);
    cache.scale_stride_token = scales.stride(3);
  }
  return cache;
}

void run_attention(AttentionCall& call, Stack& stack, bool varlen, bool with_stats) {
  check_required(call.op, stack);
  Shapes shapes(call.op);
  check_attention(call, shapes, varlen);
  for (Tensor* t : {&call.query, &call.key, &call.value, &call.block_tables, &call.attn_mask}) {
    t->make_unit_last_stride();
  }
  for (Tensor* t : {&call.cu_seqlens_q, &call.cu_seqlens_k, &call.context_lens, &call.sinks, &call.alibi_slopes,
                    &call.query_positions}) {
    t->make_contiguous();
  }

  AttentionArgs args;
  args.num_tokens = call.query.size(0);
  args.num_seqs = shapes[Dim::B];
  args.num_heads = shapes[Dim::H];
  args.num_kv_heads = shapes[Dim::KH];
  args.head_dim = shapes[Dim::D];
  args.value_dim = call.value_dim.value_or(call.value.defined() ? shapes[Dim::DV] : args.head_dim);
  args.dtype = call.query.dtype();
  args.query = rows_of(call.query);
  args.has_cache = call.kv_cache.defined();
  if (args.has_cache) {
    args.cache = cache_of(call.kv_cache, call.kv_scales);
    args.block_tables = call.block_tables.data<int32_t>();
    args.table_stride = call.block_tables.stride(0);
    args.context_lens = call.context_lens.data<int32_t>();
  }
  args.has_new = call.key.defined();
  if (args.has_new) {
    args.key = rows_of(call.key);
    args.value = call.value.defined() ? rows_of(call.value) : args.key;
    args.cu_seqlens_k = call.cu_seqlens_k.data<int32_t>();
  }
  args.decode = !varlen;
  args.cu_seqlens_q = call.cu_seqlens_q.data<int32_t>();
  args.query_positions = call.query_positions.data<int32_t>();
  args.sinks = call.sinks.data<float>();
  args.alibi_slopes = call.alibi_slopes.data<float>();
  if (const Tensor& mask = call.attn_mask; mask.defined()) {
    args.attn_mask = mask.data<bool>();
    args.mask_columns = mask.size(mask.rank - 1);
    args.mask_stride_row = mask.stride(mask.rank - 2);
    args.mask_heads = mask.rank == 3 ? mask.size(0) : 0;
    args.mask_stride_head = mask.rank == 3 ? mask.stride(0) : 0;
  }
  args.softmax_scale =
      static_cast<float>(call.softmax_scale.value_or(1.0 / std::sqrt(static_cast<double>(args.head_dim))));
  args.logits_soft_cap = static_cast<float>(call.logits_soft_cap);
  args.causal = call.causal;
  args.sliding_window = std::min(call.sliding_window.value_or(0), kWidest);
  args.attention_chunk = std::min(call.attention_chunk.value_or(0), kWidest);
  args.poll = raise_signals;
  check_attention_values(args, call, shapes);

  Tensor out = Tensor::empty({args.num_tokens, args.num_heads, args.value_dim}, call.query.type_code);
  args.out = out.data<void>();
  if (!with_stats) {
    attention(args);
    return stack.put(std::move(out));
  }
  Tensor lse = Tensor::empty({args.num_tokens, args.num_heads}, aoti_torch_dtype_float32());
  Tensor max_logits = Tensor::empty({args.num_tokens, args.num_heads}, aoti_torch_dtype_float32());
  args.lse = lse.data<float>();
  args.max_logits = max_logits.data<float>();
  attention(args);
  stack.put(std::move(out));
  stack.put(std::move(lse));
  stack.put(std::move(max_logits));
}

template <bool with_stats>
void paged_attention_op(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  AttentionCall call;
  call.op = "paged_attention";
  call.query = stack.tensor("query");
  call.kv_cache = stack.tensor("kv_cache");
  call.block_tables = stack.tensor("block_tables");
  call.context_lens = stack.tensor("context_lens");
  call.kv_scales = stack.optional_tensor("kv_scales");
  call.sinks = stack.optional_tensor("sinks");
  call.alibi_slopes = stack.optional_tensor("alibi_slopes");
  call.attn_mask = stack.optional_tensor("attn_mask");
  call.softmax_scale = stack.optional_real();
  call.logits_soft_cap = stack.real();
  call.sliding_window = stack.optional_integer();
  call.attention_chunk = stack.optional_integer();
  call.value_dim = stack.optional_integer();
  run_attention(call, stack, false, with_stats);
}

template <bool with_stats>
void flash_attn_varlen_op(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  AttentionCall call;
  call.op = "flash_attn_varlen";
  call.query = stack.tensor("query");
  call.key = stack.optional_tensor("key");
  call.value = stack.optional_tensor("value");
  call.cu_seqlens_q = stack.tensor("cu_seqlens_q");
  call.cu_seqlens_k = stack.optional_tensor("cu_seqlens_k");
  call.kv_cache = stack.optional_tensor("kv_cache");
  call.block_tables = stack.optional_tensor("block_tables");
  call.context_lens = stack.optional_tensor("context_lens");
  call.max_seqlen_q = stack.integer();
  call.max_seqlen_k = stack.integer();
  call.kv_scales = stack.optional_tensor("kv_scales");
  call.sinks = stack.optional_tensor("sinks");
  call.alibi_slopes = stack.optional_tensor("alibi_slopes");
  call.attn_mask = stack.optional_tensor("attn_mask");
  call.query_positions = stack.optional_tensor("query_positions");
  call.softmax_scale = stack.optional_real();
  call.logits_soft_cap = stack.real();
  call.causal = stack.boolean();
  call.sliding_window = stack.optional_integer();
  call.attention_chunk = stack.optional_integer();
  call.value_dim = stack.optional_integer();
  run_attention(call, stack, true, with_stats);
}

// reshape_and_cache and quantize_and_cache, which differ in who chooses the scales.
void run_write(const char* op, Tensor& key, Tensor& value, const Tensor& kv_cache, const Tensor& kv_scales,
               Tensor& slot_mapping, bool compute_scales) {
  Shapes shapes(op);
  shapes.check(key, kFloats, {Dim::T, Dim::KH, Dim::D});
  shapes.check(value, 0, {Dim::T, Dim::KH, Dim::DV}, &key);
  shapes.check(kv_cache, kQuantized, {Dim::two, Dim::N, Dim::KH, Dim::S, Dim::DS}, compute_scales ? nullptr : &key);
  shapes.check(slot_mapping, kInts, {Dim::T});
  check_scales(shapes, kv_scales, compute_scales ? ScalesRank::per_token : ScalesRank::not_per_token);
  const bool latent = shapes[Dim::two] == 1;
  if (latent == value.defined()) {
    fail(op, "value", latent ? "be None for a latent kv_cache" : "be given unless kv_cache is latent",
         show_presence(value));
  }
  if (shapes[Dim::DS] < shapes[Dim::D]) {
    fail(op, "kv_cache", "have DS >= D = " + show(shapes[Dim::D]), "DS = " + show(shapes[Dim::DS]));
  }
  if (value.defined() && shapes[Dim::DV] > shapes[Dim::D]) {
    fail(op, "value", "have DV <= D = " + show(shapes[Dim::D]), "DV = " + show(shapes[Dim::DV]));
  }
  check_cache_strides(op, kv_cache);
  check_not_expanded(op, kv_cache);
  check_scales_presence(op, kv_cache, kv_scales);
  if (compute_scales) check_not_expanded(op, kv_scales);

  key.make_unit_last_stride();
  value.make_unit_last_stride();
  slot_mapping.make_contiguous();
  slot_mapping.make_apart_from(kv_cache);
  slot_mapping.make_apart_from(kv_scales);
  CacheWriteArgs args;
  args.num_tokens = shapes[Dim::T];
  args.head_dim = shapes[Dim::D];
  args.value_dim = value.defined() ? shapes[Dim::DV] : 0;
  args.dtype = key.dtype();
  args.key = rows_of(key);
  args.value = rows_of(value);
  args.cache = cache_of(kv_cache, kv_scales);
  if (slot_mapping.type == Type::i64) {
    args.slots = slot_mapping.data<int64_t>();
  } else {
    args.slots32 = slot_mapping.data<int32_t>();
  }
  args.compute_scales = compute_scales;

  const int64_t num_slots = shapes[Dim::N] * shapes[Dim::S];
  const auto interval = [&] { return "[-1, N * S = " + show(num_slots) + ")"; };
  if (args.slots != nullptr) {
    check_indices(op, "slot_mapping", args.slots, args.num_tokens, -1, num_slots, interval);
  } else {
    check_indices(op, "slot_mapping", args.slots32, args.num_tokens, -1, num_slots, interval);
  }
  if (!compute_scales) check_scale_values(op, kv_scales);
  write_cache(args);
}

void reshape_and_cache_op(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Tensor key = stack.tensor("key");
  Tensor value = stack.optional_tensor("value");
  Tensor kv_cache = stack.tensor("kv_cache");
  Tensor slot_mapping = stack.tensor("slot_mapping");
  Tensor kv_scales = stack.optional_tensor("kv_scales");
  check_required("reshape_and_cache", stack);
  run_write("reshape_and_cache", key, value, kv_cache, kv_scales, slot_mapping, false);
}

void quantize_and_cache_op(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Tensor key = stack.tensor("key");
  Tensor value = stack.optional_tensor("value");
  Tensor kv_cache = stack.tensor("kv_cache");
  Tensor kv_scales = stack.tensor("kv_scales");
  Tensor slot_mapping = stack.tensor("slot_mapping");
  check_required("quantize_and_cache", stack);
  run_write("quantize_and_cache", key, value, kv_cache, kv_scales, slot_mapping, true);
}

void merge_attention_states_op(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Tensor outs = stack.tensor("outs");
  Tensor lses = stack.tensor("lses");
  Tensor sinks = stack.optional_tensor("sinks");
  check_required("merge_attention_states", stack);
  Shapes shapes("merge_attention_states");
  shapes.check(outs, kFloats, {Dim::P, Dim::T, Dim::H, Dim::D});
  shapes.check(lses, kFloat32, {Dim::P, Dim::T, Dim::H});
  shapes.check(sinks, kFloat32, {Dim::H});
  for (Tensor* t : {&outs, &lses, &sinks}) t->make_contiguous();

  MergeArgs args;
  args.num_parts = shapes[Dim::P];
  args.num_tokens = shapes[Dim::T];
  args.num_heads = shapes[Dim::H];
  args.head_dim = shapes[Dim::D];
  args.dtype = outs.dtype();
  args.outs = outs.data<void>();
  args.lses = lses.data<float>();
  args.sinks = sinks.data<float>();
  Tensor out = Tensor::empty({args.num_tokens, args.num_heads, args.head_dim}, outs.type_code);
  Tensor lse = Tensor::empty({args.num_tokens, args.num_heads}, aoti_torch_dtype_float32());
  args.out = out.data<void>();
  args.lse = lse.data<float>();
  merge_attention_states(args);
  stack.put(std::move(out));
  stack.put(std::move(lse));
}

std::vector<int64_t> block_ids(const char* op, Tensor& t, int64_t num_blocks) {
  t.make_contiguous();
  std::vector<int64_t> ids(static_cast<size_t>(t.size(0)));
  if (t.type == Type::i64) {
    std::copy_n(t.data<int64_t>(), ids.size(), ids.begin());
  } else {
    std::copy_n(t.data<int32_t>(), ids.size(), ids.begin());
  }
  check_indices(op, t.name, ids.data(), t.size(0), -1, num_blocks,
                [&] { return "[-1, N = " + show(num_blocks) + ")"; });
  return ids;
}

void check_destinations(const char* op, const std::vector<int64_t>& src, const std::vector<int64_t>& dst) {
  std::vector<std::pair<int64_t, int64_t>> written;  // (block, pair)
  for (size_t i = 0; i < dst.size(); ++i) {
    if (src[i] >= 0 && dst[i] >= 0) written.emplace_back(dst[i], i);
  }
  std::sort(written.begin(), written.end());
  int64_t repeated = -1;
  for (size_t i = 1; i < written.size(); ++i) {
    if (written[i].first != written[i - 1].first) continue;
    if (repeated < 0 || written[i].second < repeated) repeated = written[i].second;
  }
  if (repeated < 0) return;
  fail(op, "dst_blocks", "not repeat a block",
       show(dst[static_cast<size_t>(repeated)]) + " at index " + show(repeated));
}

void copy_blocks_op(StableIValue* values, uint64_t, uint64_t) {
  const char* op = "copy_blocks";
  Stack stack(values);
  Tensor kv_cache = stack.tensor("kv_cache");
  Tensor src_blocks = stack.tensor("src_blocks");
  Tensor dst_blocks = stack.tensor("dst_blocks");
  Tensor kv_scales = stack.optional_tensor("kv_scales");
  check_required(op, stack);
  Shapes shapes(op);
  shapes.check(kv_cache, kFloats | kQuantized, {Dim::two, Dim::N, Dim::KH, Dim::S, Dim::DS});
  shapes.check(src_blocks, kInts, {Dim::Pairs});
  shapes.check(dst_blocks, kInts, {Dim::Pairs});
  check_scales(shapes, kv_scales, ScalesRank::any);
  check_cache_strides(op, kv_cache);
  check_not_expanded(op, kv_cache);
  check_scales_presence(op, kv_cache, kv_scales);
  if (kv_scales.defined() && kv_scales.rank == 4) check_not_expanded(op, kv_scales);

  const std::vector<int64_t> src = block_ids(op, src_blocks, shapes[Dim::N]);
  const std::vector<int64_t> dst = block_ids(op, dst_blocks, shapes[Dim::N]);
  check_destinations(op, src, dst);
  copy_blocks(cache_of(kv_cache, kv_scales), src.data(), dst.data(), static_cast<int64_t>(src.size()));
}

void gather_cache_op(StableIValue* values, uint64_t, uint64_t) {
  const char* op = "gather_cache";
  Stack stack(values);
  Tensor kv_cache = stack.tensor("kv_cache");
  Tensor block_tables = stack.tensor("block_tables");
  Tensor context_lens = stack.tensor("context_lens");
  const int64_t max_len = stack.integer();
  Tensor kv_scales = stack.optional_tensor("kv_scales");
  Tensor starts = stack.optional_tensor("starts");
  check_required(op, stack);
  Shapes shapes(op);
  shapes.check(kv_cache, kFloats | kQuantized, {Dim::two, Dim::N, Dim::KH, Dim::S, Dim::DS});
  shapes.check(block_tables, kInt32, {Dim::B, Dim::M});
  shapes.check(context_lens, kInt32, {Dim::B});
  check_scales(shapes, kv_scales, ScalesRank::any);
  shapes.check(starts, kInt32, {Dim::B});
  check_cache_strides(op, kv_cache);
  check_scales_presence(op, kv_cache, kv_scales);
  if (max_len < 0) fail(op, "max_len", "be >= 0", show(max_len));

  block_tables.make_unit_last_stride();
  context_lens.make_contiguous();
  starts.make_contiguous();
  GatherArgs args;
  args.cache = cache_of(kv_cache, kv_scales);
  args.block_tables = block_tables.data<int32_t>();
  args.table_stride = block_tables.stride(0);
  args.context_lens = context_lens.data<int32_t>();
  args.starts = starts.data<int32_t>();
  args.num_seqs = shapes[Dim::B];
  args.max_len = max_len;
  check_gather_values(args, op, kv_scales, shapes[Dim::M]);

  const int32_t type = is_quantized(kv_cache) ? aoti_torch_dtype_float32() : kv_cache.type_code;
  const Cache& cache = args.cache;
  Tensor key = Tensor::empty({args.num_seqs, cache.num_kv_heads, max_len, cache.stored_dim}, type);
  Tensor value = Tensor::empty({args.num_seqs, cache.num_kv_heads, max_len, cache.latent ? 0 : cache.stored_dim}, type);
  args.key = key.data<void>();
  if (!cache.latent) args.value = value.data<void>();
  gather_cache(args);
  stack.put(std::move(key));
  stack.put(std::move(value));
}

}  // namespace
}  // namespace torch_paged

// "avx512", "avx2" or "generic"; null when TORCH_PAGED_CPU_ISA asks for what this machine has not.
extern "C" __attribute__((visibility("default"))) const char* torch_paged_isa() {
  try {
    return torch_paged::isa_name();
  } catch (const std::exception&) {
    return nullptr;
  }
}

STABLE_TORCH_LIBRARY_IMPL(paged, CPU, m) {
  using namespace torch_paged;
  m.impl("reshape_and_cache", with_python_errors<reshape_and_cache_op>);
  m.impl("quantize_and_cache", with_python_errors<quantize_and_cache_op>);
  m.impl("paged_attention", with_python_errors<paged_attention_op<false>>);
  m.impl("paged_attention.with_stats", with_python_errors<paged_attention_op<true>>);
  m.impl("flash_attn_varlen", with_python_errors<flash_attn_varlen_op<false>>);
  m.impl("flash_attn_varlen.with_stats", with_python_errors<flash_attn_varlen_op<true>>);
  m.impl("merge_attention_states", with_python_errors<merge_attention_states_op>);
  m.impl("copy_blocks", with_python_errors<copy_blocks_op>);
  m.impl("gather_cache", with_python_errors<gather_cache_op>);
}
