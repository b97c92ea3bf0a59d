// What the kernels see: raw pointers, sizes and strides. No torch header is included below this directory.
// Functions here are static: a copy compiled for a wide instruction set must never serve the baseline code.
#pragma once

#include <cstdint>

namespace torch_paged {

// Storage types. The order is part of the kernel tables.
enum class DType : int { f32, bf16, f16, i8, e4m3, e5m2 };

static inline int64_t element_size(DType t) {
  return t == DType::f32 ? 4 : (t == DType::bf16 || t == DType::f16) ? 2 : 1;
}

static constexpr bool is_quantized(DType t) { return t >= DType::i8; }

// The largest magnitude of a quantised type.
static constexpr float largest(DType t) { return t == DType::i8 ? 127.0f : t == DType::e4m3 ? 448.0f : 57344.0f; }

// A paged cache (2 | 1, N, KH, S, DS) with any strides and a unit last stride. Strides count elements.
struct Cache {
  void* data = nullptr;
  DType dtype = DType::f32;
  bool latent = false;  // size(0) == 1: the value is the first value_dim lanes of the key
  int64_t stride_kv = 0, stride_block = 0, stride_head = 0, stride_token = 0;
  int64_t num_blocks = 0, num_kv_heads = 0, block_size = 0, stored_dim = 0;
  // kv_scales, null for an unquantised cache. A stride of 0 broadcasts: rank 1 has only stride_kv, rank 2 adds
  // stride_head, rank 4 has all four.
  float* scales = nullptr;
  int scales_rank = 0;
  int64_t scale_stride_kv = 0, scale_stride_block = 0, scale_stride_head = 0, scale_stride_token = 0;
};

// Dense rows (T, heads, dim) with a unit last stride.
struct Rows {
  const void* data = nullptr;
  int64_t stride_token = 0, stride_head = 0;
};

// One attention call: decode and varlen alike. Dimensions: T query rows, B sequences, H query heads, KH kv heads.
struct AttentionArgs {
  int64_t num_tokens = 0, num_seqs = 0, num_heads = 0, num_kv_heads = 0, head_dim = 0, value_dim = 0;
  DType dtype = DType::f32;  // of query, out and the new keys and values
  Rows query;                // (T, H, D)
  void* out = nullptr;       // (T, H, value_dim) contiguous
  float* lse = nullptr;      // (T, H) contiguous, or null
  float* max_logits = nullptr;

  bool has_cache = false;
  Cache cache;
  const int32_t* block_tables = nullptr;  // (B, M), row stride table_stride, unit column stride
  int64_t table_stride = 0;
  const int32_t* context_lens = nullptr;  // (B,)

  bool has_new = false;                   // keys beside (or instead of) the cache
  Rows key, value;                        // (Tk, KH, D), (Tk, KH, value_dim); value == key in a latent call
  const int32_t* cu_seqlens_k = nullptr;  // (B + 1,)

  bool decode = false;                       // one query per sequence at position context_len - 1; cu_seqlens_q is null
  const int32_t* cu_seqlens_q = nullptr;     // (B + 1,)
  const int32_t* query_positions = nullptr;  // (T,), or null

  const float* sinks = nullptr;         // (H,), or null
  const float* alibi_slopes = nullptr;  // (H,), or null
  const bool* attn_mask = nullptr;      // (T, C), (KH, T, C) or (H, T, C), unit column stride
  int64_t mask_stride_head = 0, mask_stride_row = 0, mask_columns = 0;
  int64_t mask_heads = 0;  // 0: shared by all heads, else KH or H

  float softmax_scale = 1.0f, logits_soft_cap = 0.0f;  // cap 0: off
  bool causal = false;
  int64_t sliding_window = 0, attention_chunk = 0;  // 0: off

  void (*poll)() = nullptr;  // called now and then in a long call, on the thread that made it; may throw to end it
};

// The kernels. Every index has been checked by the caller; they throw what `poll` does, and std::bad_alloc.
void attention(const AttentionArgs& args);

// key (T, KH, D), value (T, KH, DV) in source_dtype go to the slots of the cache; -1 skips. value.data is null for a
// latent cache. compute_scales: per-token-and-head scales are computed and written to cache.scales
// (quantize_and_cache), else they are read.
struct CacheWriteArgs {
  int64_t num_tokens = 0, head_dim = 0, value_dim = 0;
  DType dtype = DType::f32;
  Rows key, value;
  Cache cache;
  const int64_t* slots = nullptr;  // exactly one of slots and slots32
  const int32_t* slots32 = nullptr;
  bool compute_scales = false;
};
void write_cache(const CacheWriteArgs& args);

// Block pairs; -1 skips. Sources are read as they were before the call. Per-token scales (rank 4) travel with their
// blocks.
void copy_blocks(const Cache& cache, const int64_t* src, const int64_t* dst, int64_t num_pairs);

// Dense (B, KH, max_len, DS) contiguous keys and values: float32 when the cache is quantised, else its dtype. Zeros
// elsewhere.
struct GatherArgs {
  Cache cache;
  const int32_t* block_tables = nullptr;
  int64_t table_stride = 0;
  const int32_t* context_lens = nullptr;
  const int32_t* starts = nullptr;  // (B,), or null
  int64_t num_seqs = 0, max_len = 0;
  void* key = nullptr;
  void* value = nullptr;  // null for a latent cache
};
void gather_cache(const GatherArgs& args);

// outs (P, T, H, D) in dtype, lses (P, T, H) float32, contiguous.
struct MergeArgs {
  int64_t num_parts = 0, num_tokens = 0, num_heads = 0, head_dim = 0;
  DType dtype = DType::f32;
  const void* outs = nullptr;
  const float* lses = nullptr;
  const float* sinks = nullptr;
  void* out = nullptr;
  float* lse = nullptr;
};
void merge_attention_states(const MergeArgs& args);

// "avx512", "avx2" or "generic": the best this machine has, or what TORCH_PAGED_CPU_ISA asks for.
const char* isa_name();

}  // namespace torch_paged
