// Cache writes, copies and gathers, and the merge of attention states: plans around the row kernels.
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "parallel.h"
#include "plan.h"
#include "prefetch.h"

namespace torch_paged {

namespace {

char* cache_row(const Cache& cache, int64_t kv, int64_t block, int64_t head, int64_t offset) {
  return static_cast<char*>(cache.data) +
         (kv * cache.stride_kv + block * cache.stride_block + head * cache.stride_head + offset * cache.stride_token) *
             element_size(cache.dtype);
}

float* cache_scale(const Cache& cache, int64_t kv, int64_t block, int64_t head, int64_t offset) {
  return cache.scales + kv * cache.scale_stride_kv + block * cache.scale_stride_block + head * cache.scale_stride_head +
         offset * cache.scale_stride_token;
}

// Finite and > 0, also for rows that hold infinities or are too small to divide.
float scale_of(float amax, DType dtype) {
  const float scale = std::min(amax, std::numeric_limits<float>::max()) / largest(dtype);
  return scale > 0.0f ? scale : 1.0f;
}

struct Place {
  int64_t block, offset;
};

// The lines that a token's rows of one head will be written to. The rows of a cache are scattered: a store that misses
// the caches holds up the stores behind it.
void prefetch_rows(const Cache& cache, Place to, int64_t head) {
  const int64_t bytes = cache.stored_dim * element_size(cache.dtype);
  for (int kv = 0; kv < (cache.latent ? 1 : 2); ++kv) {
    prefetch_row(cache_row(cache, kv, to.block, head, to.offset), bytes);
  }
}

// Rows of whole lines go past the caches, so that the lines need not be read first: half the traffic. A prompt's rows
// are too many for a core's own cache; those of a decode step stay there for the attention that follows.
bool deserves_streams(const CacheWriteArgs& args) {
#if defined(__SSE2__)
  constexpr int64_t kCoreCacheBytes = 1 << 20, kLine = 64;
  const int64_t key_bytes = args.head_dim * element_size(args.dtype);
  const int64_t value_bytes = args.value_dim * element_size(args.dtype);
  const int64_t written = args.num_tokens * args.cache.num_kv_heads * (key_bytes + value_bytes);
  return !is_quantized(args.cache.dtype) && key_bytes % kLine == 0 && value_bytes % kLine == 0 &&
         written >= kCoreCacheBytes;
#else
  return false;
#endif
}

void stream_row(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    for (int64_t i = 0; i < bytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    }
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

// Before other threads may read what was streamed.
void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

void write_row(const CacheWriteArgs& args, const KernelTable& isa, int kv, int64_t token, Place to, int64_t head,
               bool stream) {
  const Cache& cache = args.cache;
  const Rows& rows = kv == 0 ? args.key : args.value;
  const int64_t dim = kv == 0 ? args.head_dim : args.value_dim, es = element_size(args.dtype);
  const char* source = static_cast<const char*>(rows.data) + (token * rows.stride_token + head * rows.stride_head) * es;
  char* out = cache_row(cache, kv, to.block, head, to.offset);
  if (stream) {
    stream_row(out, source, dim * es);
  } else if (!is_quantized(cache.dtype)) {
    std::memcpy(out, source, dim * es);
  } else {
    float* scale = cache_scale(cache, kv, to.block, head, to.offset);
    if (args.compute_scales) {
      *scale = scale_of(isa.absolute_max(args.dtype, source, dim), cache.dtype);
    }
    isa.quantize_row(args.dtype, source, *scale, cache.dtype, out, dim);
  }
  const int64_t cache_es = element_size(cache.dtype);
  if (dim < cache.stored_dim) std::memset(out + dim * cache_es, 0, (cache.stored_dim - dim) * cache_es);
}

}  // namespace

void write_cache(const CacheWriteArgs& args) {
  const KernelTable& isa = kernels();
  const int64_t token_bytes = args.cache.num_kv_heads * args.head_dim * 4 * element_size(args.dtype);
  constexpr int64_t kTokensAtOnce = 32, kTokensAhead = 2;
  const int64_t groups = (args.num_tokens + kTokensAtOnce - 1) / kTokensAtOnce;
  const int64_t heads = args.cache.num_kv_heads, block_size = args.cache.block_size;
  const int parts = args.cache.latent ? 1 : 2;
  const bool stream = deserves_streams(args);
  parallel_for(groups, threads_for(args.num_tokens * token_bytes), [&](int64_t group) {
    const int64_t begin = group * kTokensAtOnce, end = std::min(args.num_tokens, begin + kTokensAtOnce);
    const auto slot_of = [&](int64_t token) -> int64_t {
      if (token < begin || token >= end) return -1;
      return args.slots ? args.slots[token] : args.slots32[token];
    };
    for (int64_t token = begin - kTokensAhead; token < end; ++token) {
      const int64_t slot = slot_of(token), slot_ahead = slot_of(token + kTokensAhead);
      const Place to{slot / block_size, slot % block_size};
      const Place ahead{slot_ahead / block_size, slot_ahead % block_size};
      for (int64_t head = 0; head < heads; ++head) {
        if (slot_ahead >= 0 && !stream) prefetch_rows(args.cache, ahead, head);
        if (slot < 0) continue;
        for (int kv = 0; kv < parts; ++kv) write_row(args, isa, kv, token, to, head, stream);
      }
    }
    if (stream) finish_streams();
  });
}

void copy_blocks(const Cache& cache, const int64_t* src, const int64_t* dst, int64_t num_pairs) {
  std::vector<std::pair<int64_t, int64_t>> pairs;
  for (int64_t i = 0; i < num_pairs; ++i)
    if (src[i] >= 0 && dst[i] >= 0 && src[i] != dst[i]) pairs.emplace_back(src[i], dst[i]);

  // A destination that is also a later source would be overwritten too early: those sources are saved first.
  std::vector<int64_t> destinations;
  for (const auto& pair : pairs) destinations.push_back(pair.second);
  std::sort(destinations.begin(), destinations.end());
  std::vector<size_t> saved;
  for (size_t i = 0; i < pairs.size(); ++i)
    if (std::binary_search(destinations.begin(), destinations.end(), pairs[i].first)) saved.push_back(i);

  const int parts = cache.latent ? 1 : 2;
  const int64_t row_bytes = cache.stored_dim * element_size(cache.dtype);
  const int64_t rows = cache.num_kv_heads * cache.block_size, block_bytes = parts * rows * row_bytes;
  const bool token_scales = cache.scales_rank == 4;
  std::vector<char> block_copies(saved.size() * block_bytes);
  std::vector<float> scale_copies(token_scales ? saved.size() * parts * rows : 0);

  // fn(row of the block, cache row, its scale) for every row of a block
  const auto for_each_row = [&](int64_t block, const auto& fn) {
    int64_t row = 0;
    for (int kv = 0; kv < parts; ++kv)
      for (int64_t head = 0; head < cache.num_kv_heads; ++head)
        for (int64_t offset = 0; offset < cache.block_size; ++offset, ++row)
          fn(row, cache_row(cache, kv, block, head, offset),
             token_scales ? cache_scale(cache, kv, block, head, offset) : nullptr);
  };
  for (size_t i = 0; i < saved.size(); ++i)
    for_each_row(pairs[saved[i]].first, [&](int64_t row, const char* from, const float* scale) {
      std::memcpy(block_copies.data() + i * block_bytes + row * row_bytes, from, row_bytes);
      if (scale) scale_copies[i * parts * rows + row] = *scale;
    });

  std::vector<int64_t> copy_of(pairs.size(), -1);
  for (size_t i = 0; i < saved.size(); ++i) copy_of[saved[i]] = static_cast<int64_t>(i);
  parallel_for(pairs.size(), threads_for(pairs.size() * block_bytes), [&](int64_t i) {
    const auto [from_block, to_block] = pairs[i];
    const int64_t copy = copy_of[i];
    if (copy >= 0) {
      for_each_row(to_block, [&](int64_t row, char* to, float* scale) {
        std::memcpy(to, block_copies.data() + copy * block_bytes + row * row_bytes, row_bytes);
        if (scale) *scale = scale_copies[copy * parts * rows + row];
      });
      return;
    }
    for (int kv = 0; kv < parts; ++kv)
      for (int64_t head = 0; head < cache.num_kv_heads; ++head)
        for (int64_t offset = 0; offset < cache.block_size; ++offset) {
          std::memcpy(cache_row(cache, kv, to_block, head, offset), cache_row(cache, kv, from_block, head, offset),
                      row_bytes);
          if (token_scales)
            *cache_scale(cache, kv, to_block, head, offset) = *cache_scale(cache, kv, from_block, head, offset);
        }
  });
}

void gather_cache(const GatherArgs& args) {
  const KernelTable& isa = kernels();
  const Cache& cache = args.cache;
  const bool quantized = is_quantized(cache.dtype);
  const int64_t out_row_bytes = cache.stored_dim * (quantized ? 4 : element_size(cache.dtype));
  if (args.max_len * out_row_bytes == 0) return;  // the results have no memory
  const int parts = cache.latent ? 1 : 2;
  const int64_t units = args.num_seqs * cache.num_kv_heads;
  parallel_for(units, threads_for(units * args.max_len * out_row_bytes * parts), [&](int64_t unit) {
    const int64_t seq = unit / cache.num_kv_heads, head = unit % cache.num_kv_heads;
    const int64_t start = args.starts ? args.starts[seq] : 0, length = args.context_lens[seq];
    const int32_t* table = args.block_tables + seq * args.table_stride;
    for (int kv = 0; kv < parts; ++kv) {
      char* out = static_cast<char*>(kv == 0 ? args.key : args.value) + unit * args.max_len * out_row_bytes;
      std::memset(out, 0, start * out_row_bytes);
      std::memset(out + (start + length) * out_row_bytes, 0, (args.max_len - start - length) * out_row_bytes);
      out += start * out_row_bytes;
      for (int64_t token = 0; token < length; ++token, out += out_row_bytes) {
        const int64_t block = table[token / cache.block_size], offset = token % cache.block_size;
        if (block < 0) {
          std::memset(out, 0, out_row_bytes);
          continue;
        }
        const char* from = cache_row(cache, kv, block, head, offset);
        if (quantized)
          isa.decode_row(cache.dtype, from, *cache_scale(cache, kv, block, head, offset), reinterpret_cast<float*>(out),
                         cache.stored_dim);
        else
          std::memcpy(out, from, out_row_bytes);
      }
    }
  });
}

void merge_attention_states(const MergeArgs& args) {
  const KernelTable& isa = kernels();
  const int64_t rows = args.num_tokens * args.num_heads;
  constexpr int64_t kRowsAtOnce = 64;
  parallel_for((rows + kRowsAtOnce - 1) / kRowsAtOnce,
               threads_for(args.num_parts * rows * args.head_dim * element_size(args.dtype)), [&](int64_t group) {
                 const int64_t end = std::min(rows, (group + 1) * kRowsAtOnce);
                 for (int64_t row = group * kRowsAtOnce; row < end; ++row)
                   isa.merge_row(args, row / args.num_heads, row % args.num_heads);
               });
}

}  // namespace torch_paged
