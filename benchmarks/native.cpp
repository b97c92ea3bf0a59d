// The kernel alone, in a loop: what a call of the op is compared with. Linked with the objects of the extension.
#include <cstdint>
#include <exception>

#include "params.h"

// The instruction set of all calls, chosen by the first of them; null where the one asked for does not run here.
extern "C" const char* instruction_set() {
  try {
    return torch_paged::isa_name();
  } catch (const std::exception&) {
    return nullptr;
  }
}

extern "C" void decode_loop(int dtype, const void* query, void* out, const void* kv_cache, const int32_t* block_tables,
                            const int32_t* context_lens, int64_t num_seqs, int64_t num_heads, int64_t num_blocks,
                            int64_t num_kv_heads, int64_t block_size, int64_t head_dim, int64_t table_width,
                            int64_t calls) {
  using namespace torch_paged;
  AttentionArgs args;
  args.num_tokens = args.num_seqs = num_seqs;
  args.num_heads = num_heads;
  args.num_kv_heads = num_kv_heads;
  args.head_dim = args.value_dim = head_dim;
  args.dtype = args.cache.dtype = static_cast<DType>(dtype);
  args.query = {query, num_heads * head_dim, head_dim};
  args.out = out;
  args.has_cache = true;
  args.cache.data = const_cast<void*>(kv_cache);
  args.cache.stride_token = head_dim;
  args.cache.stride_head = block_size * head_dim;
  args.cache.stride_block = num_kv_heads * args.cache.stride_head;
  args.cache.stride_kv = num_blocks * args.cache.stride_block;
  args.cache.num_blocks = num_blocks;
  args.cache.num_kv_heads = num_kv_heads;
  args.cache.block_size = block_size;
  args.cache.stored_dim = head_dim;
  args.block_tables = block_tables;
  args.table_stride = table_width;
  args.context_lens = context_lens;
  args.decode = args.causal = true;
  args.softmax_scale = 1 / __builtin_sqrtf((float)head_dim);
  for (int64_t i = 0; i < calls; ++i) attention(args);
}
