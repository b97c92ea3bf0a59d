// One work item of many query rows: the keys and values of a block are packed once and serve all rows of the tile.
#pragma once

#include "keys.h"
#include "scratch.h"
#include "softmax.h"
#include "tile.h"

namespace torch_paged {
namespace {

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
    if (quantized) scales.load(args, block, head);
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
        poisoned.add<typename Kernel::Direct>(s.bits[r + i], unit.count, s.logits + i * 64, args.value_dim,
                                              s.acc + (r + i) * lanes, lanes);
    }
  }
  write_rows<Kernel>(args, seq, item, head, partials, s.max, s.sum, s.acc);
}

}  // namespace
}  // namespace torch_paged
