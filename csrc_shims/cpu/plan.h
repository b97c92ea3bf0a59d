// How one attention call is cut into work items. The cut decides the order of every sum, so it depends on the sequence
// alone: never on the batch around it or on the number of threads.
#pragma once

#include "params.h"

namespace torch_paged {

constexpr int kBlockKeys = 64;         // keys a kernel handles at once: one 64-bit visibility mask
constexpr int kMaxDirectRows = 16;     // query rows per kv head up to which keys are used in place, without packing
constexpr int kSplitKeysDirect = 512;  // keys of one partial result, few query rows
constexpr int kSplitKeysTile = 2048;   // keys of one partial result, one packed tile
constexpr int kTileRows = 256;         // query rows of a tile, G rows per token

// Dimensions: R = q_len * G rows of a kv head, row r = token r / G, head r % G.
struct Sequence {
  const int32_t* table = nullptr;          // its row of block_tables
  int64_t query_begin = 0, query_len = 0;  // rows of the packed query
  int64_t context_len = 0;                 // keys in the cache
  int64_t new_begin = 0, new_len = 0;      // keys beside the cache
  int64_t partial_begin = -1;              // row of the partial buffers, -1: not split
  int64_t num_splits = 0;
  int64_t kv_len() const { return context_len + new_len; }
};

struct Item {
  int64_t seq = 0;
  int64_t head_begin = 0, head_end = 0;  // kv heads
  int64_t token_begin = 0, num_tokens = 0;
  int64_t key_begin = 0, key_end = 0;
  int64_t partial = -1;  // row of the partial buffers for head 0 of this split, -1: write the output
  bool tile = false;
};

struct Partials {
  float* acc = nullptr;  // (rows, acc_dim), lanes in their natural order
  float* max = nullptr;  // (rows,)
  float* sum = nullptr;  // (rows,)
};

// Whether the call has ended early, as between its work items (parallel.h): a tile of many keys asks between its
// blocks.
class Stop;
bool has_ended(Stop* stop);

// Keys [lo, hi) that a query at `position` sees; attn_mask comes on top.
struct Interval {
  int64_t lo, hi;
};

static inline Interval visible_keys(const AttentionArgs& args, int64_t position, int64_t kv_len) {
  Interval keys{0, kv_len};
  const bool backward_only = args.causal || args.decode || args.attention_chunk > 0;
  if (backward_only && position + 1 < keys.hi) keys.hi = position + 1;
  if (args.sliding_window > 0) {
    if (position - args.sliding_window + 1 > keys.lo) keys.lo = position - args.sliding_window + 1;
    if (position + args.sliding_window < keys.hi) keys.hi = position + args.sliding_window;
  }
  if (args.attention_chunk > 0 && position >= 0) {
    const int64_t begin = position / args.attention_chunk * args.attention_chunk;
    if (begin > keys.lo) keys.lo = begin;
  }
  if (keys.hi < keys.lo) keys.hi = keys.lo;
  return keys;
}

static inline int64_t query_position(const AttentionArgs& args, const Sequence& seq, int64_t token) {
  if (args.query_positions) return args.query_positions[seq.query_begin + token];
  return seq.kv_len() - seq.query_len + token;
}

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Lanes of an accumulator row.
static inline int64_t acc_dim(const AttentionArgs& args) { return round_up(args.value_dim, 64); }

// One ISA's kernels. They use no STL and allocate nothing.
struct KernelTable {
  const char* name;
  // Rows: query rows of all kv heads of the largest item of each kind.
  int64_t (*attention_scratch_bytes)(const AttentionArgs& args, int64_t direct_rows, int64_t tile_rows);
  void (*attention_item)(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
                         char* scratch, Stop* stop);
  // Merge the partial results of one kv head left to right and write the output.
  void (*attention_merge)(const AttentionArgs& args, const Sequence& seq, int64_t kv_head, const Partials& partials);
  // Rows of `dim` lanes: storage -> float32, and float32 or storage -> quantised storage.
  void (*decode_row)(DType dtype, const void* source, float scale, float* out, int64_t dim);
  void (*quantize_row)(DType source_dtype, const void* source, float scale, DType dtype, void* out, int64_t dim);
  float (*absolute_max)(DType dtype, const void* source, int64_t dim);
  void (*merge_row)(const MergeArgs& args, int64_t token, int64_t head);
};

const KernelTable& generic_kernels();
#if defined(TORCH_PAGED_X86)
const KernelTable& avx2_kernels();
const KernelTable& avx512_kernels();
#endif

// The table that TORCH_PAGED_CPU_ISA or the machine chooses.
const KernelTable& kernels();

}  // namespace torch_paged
