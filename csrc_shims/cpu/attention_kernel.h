// One work item of attention: online softmax over key blocks of 64, for a few query rows (keys in place) or a tile of
// many (keys packed). Everything a block needs to know about visibility is one 64-bit mask per query row. Memory: a
// row's accumulator, running max and running sum live in scratch (L1 or L2); logits of one block are 64 floats a row.
#pragma once

#include "plan.h"
#include "tile.h"

namespace torch_paged {
namespace {

// Cuts scratch memory; with a null base it only measures.
struct Carver {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* p = base ? (T*)(base + used) : nullptr;
    used += round_up(count * (int64_t)sizeof(T), 64) + 64;
    return p;
  }
};

// Rows = query rows of all kv heads of the item, padded to whole register tiles.
struct Scratch {
  float *acc, *max, *sum, *logits;
  char* query;
  char *staged_key, *staged_value;
  uint32_t *packed_key, *packed_value;
  uint64_t* bits;
  char* zeros;

  static Scratch carve(Carver& c, const AttentionArgs& args, int64_t rows, bool tile) {
    const int64_t padded = round_up(rows, kTileRowsAtOnce);
    const int64_t dim = round_up(args.head_dim, 64), acc = acc_dim(args), widest = dim > acc ? dim : acc;
    Scratch s;
    s.acc = c.take<float>(padded * acc);
    s.max = c.take<float>(padded);
    s.sum = c.take<float>(padded);
    s.query = c.take<char>(padded * dim * 4);
    s.bits = c.take<uint64_t>(padded);
    s.logits = c.take<float>(64 * (tile ? kTileRowsAtOnce : kMaxDirectRows));
    s.staged_key = c.take<char>(64 * widest * 4);
    s.staged_value = c.take<char>(64 * widest * 4);
    s.packed_key = c.take<uint32_t>(tile ? 64 * dim : 0);
    s.packed_value = c.take<uint32_t>(tile ? 64 * acc : 0);
    s.zeros = c.take<char>(widest * 4);
    return s;
  }
};

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

// What turns a dot product into a logit.
struct LogitRule {
  float scale, cap;
  const float* key_scale = nullptr;  // one per key of the block, null for an unquantised cache
  const float* value_scale = nullptr;
};

// Logits of one row and block become probabilities, and the row's running max, sum and accumulator move to the new max.
TP_INLINE void softmax_row(const LogitRule& rule, uint64_t bits, int count, float slope, int64_t distance, float* s,
                           float* max, float* sum, float* acc, int64_t acc_lanes) {
  if (bits == 0) {
    for (int i = 0; i < count; i += W) storeu(s + i, vf{});
    return;
  }
  const bool all = bits == low_bits(count);
  const vf lanes = __builtin_convertvector(lane_index(), vf);
  vf top = set1(kNegInf);
  for (int i = 0; i < count; i += W) {
    vf x = loadu(s + i) * rule.scale;
    if (rule.key_scale) x = x * loadu(rule.key_scale + i);
    if (rule.cap != 0.0f) x = rule.cap * vtanh(x / rule.cap);
    if (slope != 0.0f) x = x - slope * vabs((float)(distance - i) - lanes);
    if (!all) x = select_bits((uint32_t)(bits >> i), x, set1(kNegInf));
    storeu(s + i, x);
    top = vmax(top, x);
  }
  const float new_max = hmax(top);
  if (new_max > *max) {
    if (*max != kNegInf) {
      const float shrink = exp1(*max - new_max);
      *sum *= shrink;
      for (int64_t i = 0; i < acc_lanes; i += W) storeu(acc + i, loadu(acc + i) * shrink);
    }
    *max = new_max;
  }
  const float base = *max == kNegInf ? 0.0f : *max;
  vf total = vf{};
  for (int i = 0; i < count; i += W) {
    vf p = vexp(loadu(s + i) - base);
    total = total + p;
    if (rule.value_scale) p = select_bits((uint32_t)(bits >> i), p * loadu(rule.value_scale + i), vf{});
    storeu(s + i, p);
  }
  *sum += hsum(total);
}

// The scales of a unit's keys and values; 1 for keys that no row sees and for keys beside the cache.
struct UnitScales {
  float key[64], value[64];

  void load(const AttentionArgs& args, const KeyBlock& block, uint64_t seen, int64_t head) {
    const Cache& cache = args.cache;
    const float* scales = cache.scales + head * cache.scale_stride_head;
    for (int i = 0; i < block.count; ++i) {
      const bool scaled = i < block.split && (seen >> i & 1);
      key[i] = scaled ? scales[block.scale[i]] : 1.0f;
      value[i] = scaled ? scales[block.scale[i] + (cache.latent ? 0 : cache.scale_stride_kv)] : 1.0f;
    }
  }
};

template <DType S>
TP_INLINE bool is_finite(const char* row, int64_t dim) {
  vf zero = vf{};  // x * 0 is NaN for an infinity or NaN
  int64_t i = 0;
  for (; i + W <= dim; i += W) zero = zero + decode<S>(row + i * size_of<S>()) * 0.0f;
  if (i < dim) zero = zero + decode_partial<S>(row + i * size_of<S>(), (int)(dim - i)) * 0.0f;
  return hsum(zero) == 0.0f;
}

// 0 * NaN is NaN: a value that some rows see and others do not must be finite, to be multiplied by the zero probability
// of the others. Values that are not are taken out of the unit, and added to the rows that see them one by one.
struct Poisoned {
  uint64_t keys = 0;
  UnitRows rows;
  const char* zeros;

  explicit Poisoned(const char* zeros) : zeros(zeros) {}

  template <DType S>
  TP_INLINE void take(uint64_t seen_by_some, uint64_t seen_by_all, int64_t dim, UnitRows& unit) {
    keys = 0;
    for (uint64_t mixed = seen_by_some & ~seen_by_all; mixed; mixed &= mixed - 1) {
      const int i = __builtin_ctzll(mixed);
      if (is_finite<S>(unit.value[i], dim)) continue;
      keys |= 1ull << i;
      rows.value[i] = unit.value[i];
      unit.value[i] = zeros;
    }
  }

  template <class Direct>
  TP_INLINE void add(const AttentionArgs& args, uint64_t bits, int count, const float* p, float* acc) const {
    if ((keys & bits) == 0) return;
    UnitRows seen, none;
    seen.count = count;
    for (int i = 0; i < count; ++i) seen.value[i] = (keys & bits) >> i & 1 ? rows.value[i] : zeros;
    Direct::template accumulate<1>(p, seen, args.value_dim, acc, acc_dim(args), none, 0);
  }
};

template <class Kernel>
void write_row(const AttentionArgs& args, int64_t token, int64_t head, float max, float sum, const float* acc) {
  const float sink = args.sinks ? args.sinks[head] : kNegInf;
  const float top = max > sink ? max : sink;
  const int64_t row = token * args.num_heads + head;
  float factor = 0.0f, lse = top;
  if (top != kNegInf || sum != 0.0f) {  // sum != 0 with no max: NaN, which stays visible
    const float base = top == kNegInf ? 0.0f : top;
    const float shrink = max == kNegInf ? (sum != 0.0f ? 1.0f : 0.0f) : exp1(max - base);
    const float total = sum * shrink + (args.sinks ? exp1(sink - base) : 0.0f);
    factor = shrink / total;
    lse = base + __builtin_logf(total);
  }
  if (args.lse) args.lse[row] = lse;
  if (args.max_logits) args.max_logits[row] = max;
  const int64_t dim = args.value_dim;
  char* out = (char*)args.out + row * dim * element_size(args.dtype);
  for (int64_t i = 0; i < dim; i += W) {
    const int n = dim - i >= W ? W : (int)(dim - i);
    vf x = factor == 0.0f ? vf{} : Kernel::natural(acc, i) * factor;
    switch (args.dtype) {
      case DType::f32:
        n == W ? encode<DType::f32>(out + 4 * i, x) : encode_partial<DType::f32>(out + 4 * i, x, n);
        break;
      case DType::bf16:
        n == W ? encode<DType::bf16>(out + 2 * i, x) : encode_partial<DType::bf16>(out + 2 * i, x, n);
        break;
      default:
        n == W ? encode<DType::f16>(out + 2 * i, x) : encode_partial<DType::f16>(out + 2 * i, x, n);
        break;
    }
  }
}

// Rows of one kv head leave the item: to the output, or to the partial buffers.
template <class Kernel>
void write_rows(const AttentionArgs& args, const Sequence& seq, const Item& item, int64_t head,
                const Partials& partials, const float* max, const float* sum, const float* acc) {
  const int64_t group = args.num_heads / args.num_kv_heads, rows = item.num_tokens * group, lanes = acc_dim(args);
  if (item.partial < 0) {
    for (int64_t r = 0; r < rows; ++r)
      write_row<Kernel>(args, seq.query_begin + item.token_begin + r / group, head * group + r % group, max[r], sum[r],
                        acc + r * lanes);
    return;
  }
  const int64_t to = item.partial + head * rows;
  __builtin_memcpy(partials.acc + to * lanes, acc, rows * lanes * sizeof(float));
  __builtin_memcpy(partials.max + to, max, rows * sizeof(float));
  __builtin_memcpy(partials.sum + to, sum, rows * sizeof(float));
}

TP_INLINE void clear_rows(int64_t rows, int64_t lanes, const Scratch& s) {
  __builtin_memset(s.acc, 0, rows * lanes * sizeof(float));
  __builtin_memset(s.sum, 0, rows * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) s.max[r] = kNegInf;
}

TP_INLINE const char* query_row(const AttentionArgs& args, int64_t token, int64_t head) {
  return (const char*)args.query.data +
         (token * args.query.stride_token + head * args.query.stride_head) * element_size(args.dtype);
}

// What the queries of an item see: one interval per token.
struct Sight {
  Interval keys[kTileRows];
  int64_t positions[kTileRows];
  int64_t num_tokens;

  Sight(const AttentionArgs& args, const Sequence& seq, const Item& item) : num_tokens(item.num_tokens) {
    for (int64_t t = 0; t < num_tokens; ++t) {
      positions[t] = query_position(args, seq, item.token_begin + t);
      keys[t] = visible_keys(args, positions[t], seq.kv_len());
      if (keys[t].hi > item.key_end) keys[t].hi = item.key_end;
    }
  }
  uint64_t live(int64_t key0) const {
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

template <class Kernel, int RG>
TP_INLINE void direct_rows(const AttentionArgs& args, const UnitRows& unit, const UnitRows& next,
                           const Poisoned& poisoned, const LogitRule& rule, const typename Kernel::Query* query,
                           int64_t query_ld, const uint64_t* bits, const float* slopes, const int64_t* distances,
                           float* s, float* max, float* sum, float* acc) {
  const int64_t lanes = acc_dim(args), es = element_size(args.has_cache ? args.cache.dtype : args.dtype);
  Kernel::template logits<RG>(query, query_ld, unit, args.head_dim, s, next, args.head_dim * es);
  for (int g = 0; g < RG; ++g)
    softmax_row(rule, bits[g], unit.count, slopes[g], distances[g], s + g * 64, max + g, sum + g, acc + g * lanes,
                lanes);
  Kernel::template accumulate<RG>(s, unit, args.value_dim, acc, lanes, next, args.value_dim * es);
  for (int g = 0; g < RG; ++g) poisoned.add<Kernel>(args, bits[g], unit.count, s + g * 64, acc + g * lanes);
}

// Few query rows: key blocks outside, kv heads inside, so that a page is read whole.
template <class Kernel>
void direct_item(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
                 char* memory) {
  const int64_t group = args.num_heads / args.num_kv_heads, rows = item.num_tokens * group;
  const int64_t heads = item.head_end - item.head_begin, lanes = acc_dim(args);
  const int64_t query_ld = round_up(args.head_dim, Kernel::kQueryPad), widest = round_up(args.head_dim, 64);
  Carver carver{memory};
  const Scratch s = Scratch::carve(carver, args, heads * rows, false);
  __builtin_memset(s.zeros, 0, (widest > lanes ? widest : lanes) * 4);
  clear_rows(heads * rows, lanes, s);
  auto* query = (typename Kernel::Query*)s.query;
  for (int64_t i = 0; i < heads * rows; ++i) {
    const int64_t head = (item.head_begin + i / rows) * group + i % rows % group;
    Kernel::load_query(args.dtype, query_row(args, seq.query_begin + item.token_begin + i % rows / group, head),
                       args.head_dim, query + i * query_ld);
  }

  const Sight sight(args, seq, item);
  const bool staged = args.has_cache && is_quantized(args.cache.dtype);
  UnitScales scales;
  LogitRule rule{args.softmax_scale, args.logits_soft_cap};
  if (staged) {
    rule.key_scale = scales.key;
    rule.value_scale = scales.value;
  }
  KeyBlock blocks[2];
  UnitRows units[2];
  Poisoned poisoned(s.zeros);
  int which = 0, now = 0;
  next_block(args, seq, item, sight, item.key_begin / kBlockKeys * kBlockKeys, blocks[0]);
  locate_unit(args, blocks[0], item.head_begin, s.zeros, units[0]);
  while (blocks[which].live) {
    const KeyBlock& block = blocks[which];
    KeyBlock& following = blocks[1 - which];
    next_block(args, seq, item, sight, block.key0 + kBlockKeys, following);
    for (int64_t h = 0; h < heads; ++h, now = 1 - now) {
      const int64_t head = item.head_begin + h;
      UnitRows& unit = units[now];
      UnitRows& next = units[1 - now];
      if (h + 1 < heads)
        locate_unit(args, block, head + 1, s.zeros, next);
      else
        locate_unit(args, following, item.head_begin, s.zeros, next);

      uint64_t seen = 0, common = ~0ull, bits[kMaxDirectRows];
      float slopes[kMaxDirectRows];
      int64_t distances[kMaxDirectRows];
      for (int64_t r = 0; r < rows; ++r) {
        seen |= bits[r] = row_bits(args, seq, item, sight, head, r, group, block.key0);
        common &= bits[r];
        slopes[r] = args.alibi_slopes ? args.alibi_slopes[head * group + r % group] : 0.0f;
        distances[r] = sight.positions[r / group] - block.key0;
      }
      if (!seen) continue;
      if (seen != block.live) point_dead_keys(~seen, s.zeros, unit);
      if (staged) {
        scales.load(args, block, seen, head);
        stage_rows<Kernel::kStorage>(args, block, s.zeros, args.head_dim, widest, s.staged_key, unit.key, unit.count);
        stage_rows<Kernel::kStorage>(args, block, s.zeros, args.value_dim, lanes, s.staged_value, unit.value,
                                     unit.count);
      }
      poisoned.take<Kernel::kStorage>(seen, common, args.value_dim, unit);
      UnitRows none;
      for (int64_t r = 0; r < rows;) {
        const int64_t at = h * rows + r;
        const UnitRows& ahead = r == 0 ? next : none;
#define TP_DIRECT_ROWS(RG)                                                                                          \
  direct_rows<Kernel, RG>(args, unit, ahead, poisoned, rule, query + at * query_ld, query_ld, bits + r, slopes + r, \
                          distances + r, s.logits, s.max + at, s.sum + at, s.acc + at * lanes)
        switch (rows - r) {
          case 1:
            TP_DIRECT_ROWS(1);
            r += 1;
            break;
          case 2:
            TP_DIRECT_ROWS(2);
            r += 2;
            break;
          case 3:
            TP_DIRECT_ROWS(3);
            r += 3;
            break;
          default:
            TP_DIRECT_ROWS(4);
            r += 4;
            break;
        }
#undef TP_DIRECT_ROWS
      }
    }
    which = 1 - which;
  }
  for (int64_t h = 0; h < heads; ++h)
    write_rows<Kernel>(args, seq, item, item.head_begin + h, partials, s.max + h * rows, s.sum + h * rows,
                       s.acc + h * rows * lanes);
}

// Many query rows of one kv head.
template <class Kernel>
void tile_item(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
               char* memory) {
  constexpr int MR = kTileRowsAtOnce;
  const int64_t group = args.num_heads / args.num_kv_heads, rows = item.num_tokens * group, padded = round_up(rows, MR);
  const int64_t head = item.head_begin, lanes = acc_dim(args), widest = round_up(args.head_dim, 64);
  const int64_t query_ld = round_up(args.head_dim, Kernel::kQueryPad);
  const int64_t words = (args.head_dim + Kernel::kLanesPerWord - 1) / Kernel::kLanesPerWord;
  Carver carver{memory};
  const Scratch s = Scratch::carve(carver, args, rows, true);
  __builtin_memset(s.zeros, 0, (widest > lanes ? widest : lanes) * 4);
  clear_rows(padded, lanes, s);
  auto* query = (typename Kernel::Query*)s.query;
  for (int64_t r = 0; r < padded; ++r) {
    if (r < rows)
      Kernel::load_query(args.dtype,
                         query_row(args, seq.query_begin + item.token_begin + r / group, head * group + r % group),
                         args.head_dim, query + r * query_ld);
    else
      __builtin_memset(query + r * query_ld, 0, query_ld * sizeof(*query));
  }

  const Sight sight(args, seq, item);
  const bool quantized = args.has_cache && is_quantized(args.cache.dtype);
  const bool same_type = !quantized && args.dtype == Kernel::kStorage;
  const bool stage_keys = !same_type || args.head_dim % (16 * Kernel::kLanesPerWord) != 0;
  const bool stage_values = !same_type || args.value_dim != lanes;
  UnitScales scales;
  LogitRule rule{args.softmax_scale, args.logits_soft_cap};
  if (quantized) {
    rule.key_scale = scales.key;
    rule.value_scale = scales.value;
  }
  for (int64_t r = rows; r < padded; ++r) s.bits[r] = 0;
  Poisoned poisoned(s.zeros);
  KeyBlock block;
  UnitRows unit;
  next_block(args, seq, item, sight, item.key_begin / kBlockKeys * kBlockKeys, block);
  for (; block.live; next_block(args, seq, item, sight, block.key0 + kBlockKeys, block)) {
    uint64_t seen = 0, common = ~0ull;
    for (int64_t r = 0; r < rows; ++r) {
      seen |= s.bits[r] = row_bits(args, seq, item, sight, head, r, group, block.key0);
      common &= s.bits[r];
    }
    if (!seen) continue;
    locate_unit(args, block, head, s.zeros, unit);
    point_dead_keys(~seen, s.zeros, unit);
    for (int i = unit.count; i < 64; ++i) unit.key[i] = unit.value[i] = s.zeros;
    if (quantized) scales.load(args, block, seen, head);
    if (stage_keys)
      stage_rows<Kernel::kStorage>(args, block, s.zeros, args.head_dim, widest, s.staged_key, unit.key, unit.count);
    if (stage_values)
      stage_rows<Kernel::kStorage>(args, block, s.zeros, args.value_dim, lanes, s.staged_value, unit.value, unit.count);
    poisoned.take<Kernel::kStorage>(seen, common, args.value_dim, unit);
    transpose_rows(unit.key, words, s.packed_key);
    Kernel::pack_values(unit.value, lanes, s.packed_value);
    for (int64_t r = 0; r < padded; r += MR) {
      uint64_t any = 0;
      TP_UNROLL
      for (int i = 0; i < MR; ++i) any |= s.bits[r + i];
      if (!any) continue;
      Kernel::logits(query + r * query_ld, query_ld, s.packed_key, words, unit.count, s.logits);
      for (int i = 0; i < MR; ++i) {
        const int64_t token = (r + i < rows ? r + i : rows - 1) / group;
        const float slope = args.alibi_slopes ? args.alibi_slopes[head * group + (r + i) % group] : 0.0f;
        softmax_row(rule, s.bits[r + i], unit.count, slope, sight.positions[token] - block.key0, s.logits + i * 64,
                    s.max + r + i, s.sum + r + i, s.acc + (r + i) * lanes, lanes);
      }
      Kernel::accumulate(s.logits, s.packed_value, unit.count, lanes, s.acc + r * lanes);
      for (int i = 0; i < MR; ++i)
        poisoned.add<typename Kernel::Direct>(args, s.bits[r + i], unit.count, s.logits + i * 64,
                                              s.acc + (r + i) * lanes);
    }
  }
  write_rows<Kernel>(args, seq, item, head, partials, s.max, s.sum, s.acc);
}

void attention_item(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
                    char* scratch) {
#if defined(__AVX512BF16__)
  if (args.dtype == DType::bf16)
    return item.tile ? tile_item<TileDot>(args, seq, item, partials, scratch)
                     : direct_item<RowsDot>(args, seq, item, partials, scratch);
#endif
  if (item.tile) return tile_item<TileF32>(args, seq, item, partials, scratch);
  const bool staged = args.has_cache && is_quantized(args.cache.dtype);
  switch (staged ? DType::f32 : args.dtype) {
    case DType::f32:
      return direct_item<RowsF32<DType::f32>>(args, seq, item, partials, scratch);
    case DType::bf16:
      return direct_item<RowsF32<DType::bf16>>(args, seq, item, partials, scratch);
    default:
      return direct_item<RowsF32<DType::f16>>(args, seq, item, partials, scratch);
  }
}

template <class Kernel>
void merge_head(const AttentionArgs& args, const Sequence& seq, int64_t head, const Partials& partials) {
  const int64_t group = args.num_heads / args.num_kv_heads, rows = seq.query_len * group, lanes = acc_dim(args);
  const int64_t stride = rows * args.num_kv_heads;  // from one split to the next
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t first = seq.partial_begin + head * rows + r;
    float max = partials.max[first], sum = partials.sum[first];
    float* acc = partials.acc + first * lanes;
    for (int64_t i = 1; i < seq.num_splits; ++i) {
      const int64_t at = first + i * stride;
      const float other = partials.max[at], top = other > max ? other : max;
      const float base = top == kNegInf ? 0.0f : top;
      const float left = max == kNegInf ? 1.0f : exp1(max - base), right = other == kNegInf ? 1.0f : exp1(other - base);
      sum = sum * left + partials.sum[at] * right;
      for (int64_t j = 0; j < lanes; j += W)
        storeu(acc + j, loadu(acc + j) * left + loadu(partials.acc + at * lanes + j) * right);
      max = top;
    }
    write_row<Kernel>(args, seq.query_begin + r / group, head * group + r % group, max, sum, acc);
  }
}

void attention_merge(const AttentionArgs& args, const Sequence& seq, int64_t head, const Partials& partials) {
#if defined(__AVX512BF16__)
  if (args.dtype == DType::bf16) return merge_head<TileDot>(args, seq, head, partials);
#endif
  merge_head<TileF32>(args, seq, head, partials);
}

int64_t attention_scratch_bytes(const AttentionArgs& args, int64_t direct_rows, int64_t tile_rows) {
  Carver direct{nullptr}, tile{nullptr};
  if (direct_rows > 0) Scratch::carve(direct, args, direct_rows, false);
  if (tile_rows > 0) Scratch::carve(tile, args, tile_rows, true);
  return direct.used > tile.used ? direct.used : tile.used;
}

}  // namespace
}  // namespace torch_paged
