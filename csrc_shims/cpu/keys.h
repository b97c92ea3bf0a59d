// Which keys a block holds, where they lie and which rows see them: one 64-bit mask per query row.
#pragma once

#include "plan.h"
#include "rows.h"

namespace torch_paged {
namespace {

TP_INLINE uint64_t low_bits(int64_t n) { return n >= 64 ? ~0ull : n <= 0 ? 0ull : (1ull << n) - 1; }

// Keys of the interval in the block that begins at key0.
TP_INLINE uint64_t interval_bits(Interval keys, int64_t key0) {
  return low_bits(keys.hi - key0) & ~low_bits(keys.lo - key0);
}

// The mask of keys [key0, key0 + 64) in one row of attn_mask; columns beyond C count as False.
TP_INLINE uint64_t mask_bits(const AttentionArgs& args, int64_t row, int64_t query_head, int64_t kv_head,
                             int64_t key0) {
  const int64_t head = args.mask_heads == 0 ? 0 : args.mask_heads == args.num_heads ? query_head : kv_head;
  const bool* m = args.attn_mask + head * args.mask_stride_head + row * args.mask_stride_row + key0;
  const int64_t n = args.mask_columns - key0;
  uint64_t bits = 0;
  if (n >= 64) {
    for (int i = 0; i < 8; ++i)  // eight bytes of 0 or 1 become eight bits
      bits |= ((load_bits<uint64_t>(m + 8 * i) * 0x0102040810204080ull) >> 56) << (8 * i);
  } else {
    for (int64_t i = 0; i < n; ++i) bits |= (uint64_t)m[i] << i;
  }
  return bits;
}

// 64 keys of one sequence from key0, pointers for kv head 0.
struct KeyBlock {
  int64_t key0;
  uint64_t live;  // keys that some query of the item may see by length, window and chunk; no other is dereferenced
  int count;      // up to the last live key, a multiple of 16
  int split;      // keys from here on lie beside the cache
  const char* key[64];
  const char* value[64];
  int64_t scale[64];  // offset of the key's scale for kv head 0
};

TP_INLINE void locate_keys(const AttentionArgs& args, const Sequence& seq, KeyBlock& block) {
  block.count = block.live ? (int)round_up(64 - __builtin_clzll(block.live), 16) : 0;
  const int64_t in_cache = seq.context_len - block.key0;
  block.split = (int)(in_cache < 0 ? 0 : in_cache > block.count ? block.count : in_cache);
  const Cache& cache = args.cache;
  const int64_t es = element_size(cache.dtype), step = cache.stride_token * es;
  if (block.split > 0) {
    int64_t page = block.key0 / cache.block_size, offset = block.key0 % cache.block_size;
    for (int i = 0; i < block.split; offset = 0, ++page) {
      const int64_t room = cache.block_size - offset;
      const int run = (int)(room < block.split - i ? room : block.split - i);
      // The entry of a page without a live key is not read: its keys get an address that nobody follows.
      const int64_t id = block.live >> i & low_bits(run) ? seq.table[page] : 0;
      const char* key = (const char*)cache.data + (id * cache.stride_block + offset * cache.stride_token) * es;
      const char* value = cache.latent ? key : key + cache.stride_kv * es;
      for (int r = 0; r < run; ++r) {
        block.key[i + r] = key + r * step;
        block.value[i + r] = value + r * step;
        block.scale[i + r] = id * cache.scale_stride_block + (offset + r) * cache.scale_stride_token;
      }
      i += run;
    }
  }
  const int64_t new_es = element_size(args.dtype);
  for (int i = block.split; i < block.count; ++i) {
    const int64_t row = block.live >> i & 1 ? seq.new_begin + block.key0 + i - seq.context_len : 0;
    block.key[i] = (const char*)args.key.data + row * args.key.stride_token * new_es;
    block.value[i] = (const char*)args.value.data + row * args.value.stride_token * new_es;
  }
}

TP_INLINE void point_dead_keys(uint64_t dead, const char* zeros, UnitRows& unit) {
  for (dead &= low_bits(unit.count); dead; dead &= dead - 1) {
    const int i = __builtin_ctzll(dead);
    unit.key[i] = unit.value[i] = zeros;
  }
}

TP_INLINE void locate_unit(const AttentionArgs& args, const KeyBlock& block, int64_t head, const char* zeros,
                           UnitRows& unit) {
  unit.count = block.count;
  const int64_t in_cache = head * args.cache.stride_head * element_size(args.cache.dtype);
  const int64_t es = element_size(args.dtype);
  const int64_t new_key = head * args.key.stride_head * es, new_value = head * args.value.stride_head * es;
  for (int i = 0; i < block.split; ++i) {
    unit.key[i] = block.key[i] + in_cache;
    unit.value[i] = block.value[i] + in_cache;
  }
  for (int i = block.split; i < block.count; ++i) {
    unit.key[i] = block.key[i] + new_key;
    unit.value[i] = block.value[i] + new_value;
  }
  point_dead_keys(~block.live, zeros, unit);
}

template <DType To, DType From>
TP_INLINE void convert_lanes(const char* source, int64_t dim, int64_t padded, char* out) {
  int64_t i = 0;
  for (; i + W <= dim; i += W) encode_exact<To>(out + i * size_of<To>(), decode<From>(source + i * size_of<From>()));
  if (i < dim) {
    encode_exact<To>(out + i * size_of<To>(), decode_partial<From>(source + i * size_of<From>(), (int)(dim - i)));
    i += W;
  }
  for (; i < padded; i += W) encode_exact<To>(out + i * size_of<To>(), vf{});
}

template <DType To>
TP_INLINE void convert_row(DType from, const char* source, int64_t dim, int64_t padded, char* out) {
  switch (from) {
    case DType::f32:
      return convert_lanes<To, DType::f32>(source, dim, padded, out);
    case DType::bf16:
      return convert_lanes<To, DType::bf16>(source, dim, padded, out);
    case DType::f16:
      return convert_lanes<To, DType::f16>(source, dim, padded, out);
    case DType::i8:
      return convert_lanes<To, DType::i8>(source, dim, padded, out);
    case DType::e4m3:
      return convert_lanes<To, DType::e4m3>(source, dim, padded, out);
    default:
      return convert_lanes<To, DType::e5m2>(source, dim, padded, out);
  }
}

// Bring `count` rows to the storage type To, padded with zeros; every type converts exactly.
template <DType To>
void stage_rows(const AttentionArgs& args, const KeyBlock& block, const char* zeros, int64_t dim, int64_t padded,
                char* staged, const char** rows, int count) {
  for (int i = 0; i < count; ++i) {
    if (rows[i] == zeros) continue;
    char* out = staged + i * padded * size_of<To>();
    convert_row<To>(i < block.split ? args.cache.dtype : args.dtype, rows[i], dim, padded, out);
    rows[i] = out;
  }
}

// The scales of a unit's keys and values; 1 for keys beside the cache. What a row does not see is selected away later.
struct UnitScales {
  float key[64], value[64];

  void load(const AttentionArgs& args, const KeyBlock& block, int64_t head) {
    const Cache& cache = args.cache;
    const float* keys = cache.scales + head * cache.scale_stride_head;
    const float* values = keys + (cache.latent ? 0 : cache.scale_stride_kv);
    if (!(block.live & low_bits(block.split))) {
      for (int i = 0; i < block.split; ++i) key[i] = value[i] = 1.0f;
    } else if (cache.scales_rank == 4) {
      for (int i = 0; i < block.split; ++i) {
        key[i] = keys[block.scale[i]];
        value[i] = values[block.scale[i]];
      }
    } else {
      for (int i = 0; i < block.split; i += W) {
        storeu(key + i, set1(*keys));
        storeu(value + i, set1(*values));
      }
    }
    for (int i = block.split; i < block.count; ++i) key[i] = value[i] = 1.0f;
  }
};

// What the queries of an item see: one interval per token.
struct Sight {
  Interval keys[kTileRows];
  Interval shared{0, INT64_MAX};  // keys that every token sees
  int64_t positions[kTileRows];
  int64_t num_tokens;

  Sight(const AttentionArgs& args, const Sequence& seq, const Item& item) : num_tokens(item.num_tokens) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      positions[t] = query_position(args, seq, item.token_begin + t);
      keys[t] = visible_keys(args, positions[t], seq.kv_len());
      if (keys[t].hi > item.key_end) keys[t].hi = item.key_end;
      if (keys[t].lo > shared.lo) shared.lo = keys[t].lo;
      if (keys[t].hi < shared.hi) shared.hi = keys[t].hi;
    }
  }
  // Every token sees every key of the block.
  bool all(int64_t key0) const { return shared.lo <= key0 && shared.hi >= key0 + kBlockKeys; }
  uint64_t live(int64_t key0) const {
    if (all(key0)) return ~0ull;
    uint64_t bits = 0;
    for (int64_t t = 0; t < num_tokens; ++t) bits |= interval_bits(keys[t], key0);
    return bits;
  }
};

// The next block from `key0` with a live key; key0 == key_end when there is none.
TP_INLINE void next_block(const AttentionArgs& args, const Sequence& seq, const Item& item, const Sight& sight,
                          int64_t key0, KeyBlock& block) {
  for (; key0 < item.key_end; key0 += kBlockKeys) {
    block.live = sight.live(key0);
    if (block.live) break;
  }
  block.key0 = key0 < item.key_end ? key0 : item.key_end;
  if (key0 >= item.key_end) block.live = 0;
  locate_keys(args, seq, block);
}

TP_INLINE uint64_t row_bits(const AttentionArgs& args, const Sequence& seq, const Item& item, const Sight& sight,
                            int64_t head, int64_t row, int64_t group, int64_t key0) {
  const int64_t token = row / group;
  uint64_t bits = interval_bits(sight.keys[token], key0);
  if (args.attn_mask && bits)
    bits &= mask_bits(args, seq.query_begin + item.token_begin + token, head * group + row % group, head, key0);
  return bits;
}

}  // namespace
}  // namespace torch_paged
