// One work item of many query rows, one kv head after the other: the keys and values of a block are packed once and
// serve all rows of the tile, a few rows at a time. Within a block all logits and probabilities come first, then all
// sums of values, so that one packed matrix at a time stays in L1; accumulators and probabilities of the tile stay in
// L2. While a block is computed, what the next one reads is prefetched: its keys, and at the last one the queries of
// the next head.
#pragma once

#include "keys.h"
#include "tile_scratch.h"
#include "tile_softmax.h"

namespace torch_paged {
namespace {

// The state of a tile. Row r = token r / group, head r % group.
template <class Kernel>
struct Tile {
  static constexpr int kProbabilityWords = 64 / Kernel::kLanesPerWord;

  const AttentionArgs& args;
  const Sequence& seq;
  const Item& item;
  const int64_t group, rows, padded, lanes, query_ld;
  const TileScratch s;
  const Sight sight;
  const bool quantized, plain;
  const bool queries_in_place;  // for a block or two; else copies that lie close together are faster
  int64_t head;                 // kv head
  UnitScales scales;
  LogitRule rule;
  Poisoned poisoned;
  DType poisoned_dtype;
  bool all = false;  // plain, and every row sees every key of the block: s.bits is not filled

  Tile(const AttentionArgs& args, const Sequence& seq, const Item& item, char* memory)
      : args(args),
        seq(seq),
        item(item),
        group(args.num_heads / args.num_kv_heads),
        rows(item.num_tokens * group),
        padded(round_up(rows, 2)),
        lanes(acc_dim(args)),
        query_ld(round_up(args.head_dim, W * Kernel::kLanesPerWord) / Kernel::kLanesPerWord),
        s(carve(args, rows, memory)),
        sight(args, seq, item),
        quantized(args.has_cache && is_quantized(args.cache.dtype)),
        plain(!quantized && !args.alibi_slopes && args.logits_soft_cap == 0.0f && args.softmax_scale > 0.0f),
        queries_in_place(args.dtype == Kernel::kStorage && args.head_dim % Kernel::kLanesPerWord == 0 &&
                         item.key_end - item.key_begin <= 2 * kBlockKeys),
        rule{args.softmax_scale, args.logits_soft_cap},
        poisoned(s.zeros) {
    if (quantized) {
      rule.key_scale = scales.key;
      rule.value_scale = scales.value;
    }
    const int64_t dim = round_up(args.head_dim, 64);
    __builtin_memset(s.zeros, 0, (dim > lanes ? dim : lanes) * 4);
    for (int64_t t = 0, r = 0; t < item.num_tokens; ++t)
      for (int64_t g = 0; g < group; ++g, ++r) {
        s.tokens[r] = (int32_t)t;
        s.query_offsets[r] = query_row(args, token_at(r), g) - (const char*)args.query.data;
      }
    for (int64_t r = rows; r < padded; ++r) {  // one more row like the last one, whose output nobody takes
      s.tokens[r] = s.tokens[r - 1];
      s.query_offsets[r] = s.query_offsets[r - 1];
    }
  }

  static TileScratch carve(const AttentionArgs& args, int64_t rows, char* memory) {
    Carver carver{memory};
    return TileScratch::carve(carver, args, rows);
  }

  void begin_head(int64_t to) {
    head = to;
    __builtin_memset(s.ranges, 0, padded / 2 * sizeof(KeyRange));
    for (int64_t r = 0; r < padded; ++r) s.max[r] = kNegInf;
  }

  DType stored(const KeyBlock& block) const { return block.split > 0 ? args.cache.dtype : args.dtype; }

  // Returns the keys that some row sees; `common`: that every row sees.
  uint64_t look(int64_t key0, uint64_t* common) {
    *common = ~0ull;
    all = plain && !args.attn_mask && sight.all(key0);
    if (all) return ~0ull;
    uint64_t seen = 0;
    for (int64_t t = 0, r = 0; t < item.num_tokens; ++t) {
      const uint64_t visible = interval_bits(sight.keys[t], key0);
      for (int64_t g = 0; g < group; ++g, ++r) {
        s.bits[r] =
            args.attn_mask && visible ? visible & mask_bits(args, token_at(r), head_at(r), head, key0) : visible;
        seen |= s.bits[r];
        *common &= s.bits[r];
      }
    }
    if (rows % 2) s.bits[rows] = 0;
    return seen;
  }

  int64_t token_at(int64_t r) const { return seq.query_begin + item.token_begin + s.tokens[r]; }
  int64_t head_at(int64_t r) const { return head * group + r - s.tokens[r] * group; }
  const char* query_at(int64_t kv_head, int64_t r) const {
    return (const char*)args.query.data + s.query_offsets[r] +
           kv_head * group * args.query.stride_head * element_size(args.dtype);
  }
  char* output_at(int64_t r) const {
    return (char*)args.out + (token_at(r) * args.num_heads + head_at(r)) * args.value_dim * element_size(args.dtype);
  }

  TP_INLINE void fetch_queries(int64_t kv_head, int64_t r, int64_t count) const {
    for (const int64_t end = r + count < rows ? r + count : rows; r < end; ++r)
      prefetch_row(query_at(kv_head, r), args.head_dim * element_size(args.dtype));
  }
  TP_INLINE void fetch_output(int64_t r, int64_t count) const {
    const int64_t row_bytes = args.value_dim * element_size(args.dtype);
    for (const int64_t end = r + count < rows ? r + count : rows; r < end; ++r)
      for (int64_t i = 0; i < row_bytes; i += 64) prefetch_for_write(output_at(r) + i);
  }

  // The words of MR queries.
  template <int MR>
  TP_INLINE void load_queries(int64_t r, bool first, const char** query) const {
    TP_UNROLL
    for (int i = 0; i < MR; ++i) {
      uint32_t* copy = s.query + (r + i) * query_ld;
      if (first && !queries_in_place) load_words<Kernel>(args.dtype, query_at(head, r + i), args.head_dim, copy);
      query[i] = queries_in_place ? query_at(head, r + i) : (const char*)copy;
    }
    if (!first) return;
    for (int64_t i = r + MR; i < r + 2 * MR && i < rows; ++i)  // those of the next register tile
      prefetch_row_l1(query_at(head, i), args.head_dim * element_size(args.dtype));
  }

  // Probabilities of MR rows from r on, and the keys that they see.
  template <int MR>
  TP_INLINE void weigh(int64_t r, const KeyBlock& block) {
    uint64_t some = ~0ull, every = ~0ull;
    if (!all) {
      some = 0;
      TP_UNROLL
      for (int i = 0; i < MR; ++i) {
        some |= s.bits[r + i];
        every &= s.bits[r + i];
      }
    }
    KeyRange& keys = s.ranges[r / 2];
    keys.begin = keys.end = 0;
    if (!some) return;
    keys.begin = (uint8_t)(__builtin_ctzll(some) / 16 * 16);
    keys.end = (uint8_t)(64 - __builtin_clzll(some));
    const bool first = !keys.seen;
    keys.seen = true;
    const int begin = keys.begin, end = (int)round_up(keys.end, 16);
    const int64_t words = (args.head_dim + Kernel::kLanesPerWord - 1) / Kernel::kLanesPerWord;
    const char* query[MR];
    load_queries<MR>(r, first, query);
    logits<Kernel, MR>(query, s.packed_key, words, begin, end, s.logits);
    uint32_t* p = s.probabilities + r * kProbabilityWords;
    float *max = s.max + r, *shrink = s.shrink + r, *sum = s.sum + r * W;
    if (plain && every == ~0ull)
      return plain_softmax<Kernel, MR, true>(rule.scale, nullptr, 0, 64, first, s.logits, max, shrink, sum, p);
    if (plain)
      return plain_softmax<Kernel, MR, false>(rule.scale, s.bits + r, begin, end, first, s.logits, max, shrink, sum, p);
    vf top[MR];
    for (int i = 0; i < MR; ++i) {
      const RowSight row{s.bits[r + i], sight.positions[s.tokens[r + i]] - block.key0,
                         args.alibi_slopes && r + i < rows ? args.alibi_slopes[head_at(r + i)] : 0.0f};
      top[i] = masked_logits(rule, row, block.count, s.logits + i * 64);
    }
    exponentiate<Kernel, MR, false>(s.logits, top, 1.0f, rule.value_scale, s.bits + r, begin, end, first, max, shrink,
                                    sum, p);
  }

  // Values that some rows must not meet leave the unit; the rows that see them add them one by one.
  TP_INLINE void take_poisoned(DType dtype, uint64_t seen, uint64_t common, UnitRows& unit) {
    poisoned_dtype = dtype;
    switch (dtype) {
      case DType::f32:
        return poisoned.take<DType::f32>(seen, common, args.value_dim, unit);
      case DType::bf16:
        return poisoned.take<DType::bf16>(seen, common, args.value_dim, unit);
      case DType::f16:
        return poisoned.take<DType::f16>(seen, common, args.value_dim, unit);
      case DType::i8:
        poisoned.keys = 0;
        return;
      case DType::e4m3:
        return poisoned.take<DType::e4m3>(seen, common, args.value_dim, unit);
      default:
        return poisoned.take<DType::e5m2>(seen, common, args.value_dim, unit);
    }
  }
  TP_INLINE void add_poisoned(int64_t r) {
    if ((poisoned.keys & s.bits[r]) == 0) return;
    float weights[64], *acc = s.acc + r * lanes;
    Kernel::get_probabilities(s.probabilities + r * kProbabilityWords, weights);
    for (uint64_t left = poisoned.keys & s.bits[r]; left; left &= left - 1) {
      const int k = __builtin_ctzll(left);
      for (int64_t i = 0; i < args.value_dim; i += W) {
        const vf value = load_lanes(poisoned_dtype, poisoned.rows.value[k], i, lanes_left(args.value_dim, i));
        storeu(acc + i, loadu(acc + i) + weights[k] * value);
      }
    }
  }

  // Sums of values for MR rows from r on; after the last block they leave the tile.
  template <int MR>
  TP_INLINE void sum_up(int64_t r, bool last, const Partials& partials) {
    KeyRange& keys = s.ranges[r / 2];
    const float* before = keys.started ? s.acc + r * lanes : nullptr;
    const char* p[MR];
    TP_UNROLL
    for (int i = 0; i < MR; ++i) p[i] = (const char*)(s.probabilities + (r + i) * kProbabilityWords);
    const auto add_values = [&](const auto& to) {
      accumulate<Kernel, MR>(p, s.packed_value, lanes, keys.begin, keys.end,
                             round_up(args.value_dim, Kernel::kValuePad), s.shrink + r, before, to);
    };
    if (last && keys.end > 0 && item.partial < 0 && poisoned.keys == 0) {
      char* out[MR];
      float factor[MR];
      TP_UNROLL
      for (int i = 0; i < MR; ++i) {
        const bool padding = r + i >= rows;
        out[i] = padding ? (char*)(s.acc + (r + i) * lanes) : output_at(r + i);
        factor[i] = padding ? 0.0f : finish_row(args, token_at(r + i), head_at(r + i), s.max[r + i], sum_of(r + i));
      }
      return add_values(ToOutput{args.dtype, args.value_dim, out, factor});
    }
    if (keys.end > 0) {
      add_values(ToAccumulator{s.acc + r * lanes, lanes});
      keys.started = true;
      if (poisoned.keys)
        for (int i = 0; i < MR; ++i) add_poisoned(r + i);
    }
    if (last) finish(r, MR, partials);
  }
  float sum_of(int64_t r) const { return hsum(loadu(s.sum + r * W)); }

  void finish(int64_t r, int64_t count, const Partials& partials) {
    const KeyRange& keys = s.ranges[r / 2];
    if (!keys.started) __builtin_memset(s.acc + r * lanes, 0, count * lanes * sizeof(float));
    if (!keys.seen) __builtin_memset(s.sum + r * W, 0, count * W * sizeof(float));
    const int64_t end = r + count < rows ? r + count : rows;
    for (; r < end; ++r) {
      const float* acc = s.acc + r * lanes;
      if (item.partial < 0) {
        write_row<RowsF32<DType::f32>>(args, token_at(r), head_at(r), s.max[r], sum_of(r), acc);
      } else {
        const int64_t to = item.partial + head * rows + r;
        __builtin_memcpy(partials.acc + to * lanes, acc, lanes * sizeof(float));
        partials.max[to] = s.max[r];
        partials.sum[to] = sum_of(r);
      }
    }
  }
};

// Many query rows.
template <class Kernel>
void tile_item(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials, char* memory,
               Stop* stop) {
  Tile<Kernel> tile(args, seq, item, memory);
  const TileScratch& s = tile.s;
  const int64_t rows = tile.rows, lanes = tile.lanes, widest = round_up(args.head_dim, 64);
  const int64_t first_key = item.key_begin / kBlockKeys * kBlockKeys;
  KeyBlock blocks[2];
  UnitRows units[2];
  next_block(args, seq, item, tile.sight, first_key, blocks[0]);
  locate_unit(args, blocks[0], item.head_begin, s.zeros, units[0]);
  for (int i = 0; i < units[0].count; ++i)
    prefetch_row(units[0].key[i], args.head_dim * element_size(tile.stored(blocks[0])));
  tile.fetch_queries(item.head_begin, 0, kRowsAhead);
  tile.begin_head(item.head_begin);

  bool first = true;  // block of the first head, whose queries were not prefetched before
  for (int now = 0; tile.head < item.head_end; now = 1 - now) {
    if (has_ended(stop)) return;
    const KeyBlock& block = blocks[now];
    KeyBlock& following = blocks[1 - now];
    UnitRows &unit = units[now], &next = units[1 - now];
    const int64_t head = tile.head;
    next_block(args, seq, item, tile.sight, block.key0 + kBlockKeys, following);
    const bool last = !following.live;
    const int64_t next_head = last ? head + 1 : head;
    if (last && next_head < item.head_end) next_block(args, seq, item, tile.sight, first_key, following);
    locate_unit(args, following, next_head, s.zeros, next);

    uint64_t common;
    const uint64_t seen = tile.look(block.key0, &common);
    if (!seen && !last) continue;
    if (seen != block.live) point_dead_keys(~seen, s.zeros, unit);
    DType stored = tile.stored(block);
    Ahead values(unit.value, unit.count, args.value_dim * element_size(stored), rows);
    Ahead keys(next.key, next.count, args.head_dim * element_size(tile.stored(following)), rows);
    if (tile.quantized) tile.scales.load(args, block, head);
    if (is_quantized(stored) && block.split < unit.count) {
      stage_rows<Kernel::kStorage>(args, block, s.zeros, args.head_dim, widest, s.staged_key, unit.key, unit.count);
      stage_rows<Kernel::kStorage>(args, block, s.zeros, args.value_dim, lanes, s.staged_value, unit.value, unit.count);
      stored = Kernel::kStorage;
    }
    pack_keys<Kernel>(stored, unit.key, unit.count, args.head_dim, s.packed_key);
    for_register_tiles(rows, [&](auto count, int64_t r) {
      values.fetch_some();
      if (first) tile.fetch_queries(head, r + kRowsAhead, count.value);
      if (last && item.partial < 0) tile.fetch_output(r, count.value);
      tile.template weigh<decltype(count)::value>(r, block);
    });
    tile.take_poisoned(stored, seen, common, unit);
    pack_values<Kernel>(stored, unit.value, unit.count, args.value_dim, lanes, s.packed_value);
    for_register_tiles(rows, [&](auto count, int64_t r) {
      keys.fetch_some();
      if (last && next_head < item.head_end) tile.fetch_queries(next_head, r, count.value);
      tile.template sum_up<decltype(count)::value>(r, last, partials);
    });
    first = false;
    if (last) tile.begin_head(next_head);
  }
}

}  // namespace
}  // namespace torch_paged
