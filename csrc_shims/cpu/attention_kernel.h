// One work item of attention: online softmax over key blocks of 64, for a few query rows (keys in place) or a tile of
// many (keys packed). Everything a block needs to know about visibility is one 64-bit mask per query row. Memory: a
// row's accumulator, running max and running sum live in scratch (L1 or L2); logits of one block are 64 floats a row.
#pragma once

#include "keys.h"
#include "rows_int8.h"
#include "scratch.h"
#include "softmax.h"
#include "tile_item.h"

namespace torch_paged {
namespace {

template <class Kernel, int RG>
void direct_rows(const AttentionArgs& args, int64_t key_dim, int64_t value_dim, const UnitRows& unit,
                 const UnitRows& next, const Poisoned& poisoned, const LogitRule& rule,
                 const typename Kernel::Query* query, int64_t query_ld, const RowSight* rows, float* s, float* max,
                 float* sum, float* acc) {
  const int64_t lanes = acc_dim(args), es = element_size(args.has_cache ? args.cache.dtype : args.dtype);
  Kernel::template logits<RG>(query, query_ld, unit, key_dim, s, next, args.head_dim * es);
  softmax_rows<RG>(rule, rows, unit.count, s, max, sum, acc, lanes);
  Kernel::template accumulate<RG>(s, unit, value_dim, acc, lanes, next, args.value_dim * es);
  for (int g = 0; g < RG; ++g)
    poisoned.add<Kernel>(rows[g].bits, unit.count, s + g * 64, value_dim, acc + g * lanes, lanes);
}

// All query rows of one kv head on one unit.
template <class Kernel>
TP_INLINE void direct_unit(const AttentionArgs& args, int64_t key_dim, int64_t value_dim, UnitRows& unit,
                           const UnitRows& next, uint64_t seen, uint64_t common, Poisoned& poisoned,
                           const LogitRule& rule, const typename Kernel::Query* query, int64_t query_ld, int64_t rows,
                           const RowSight* sights, float* logits, float* max, float* sum, float* acc) {
  const int64_t lanes = acc_dim(args);
  poisoned.take<Kernel::kStorage>(seen, common, value_dim, unit);
  const UnitRows none;
  for (int64_t r = 0; r < rows;) {
    const auto group = [&](auto count) {
      direct_rows<Kernel, count.value>(args, key_dim, value_dim, unit, r == 0 ? next : none, poisoned, rule,
                                       query + r * query_ld, query_ld, sights + r, logits, max + r, sum + r * W,
                                       acc + r * lanes);
      r += count.value;
    };
    const int64_t left = rows - r;
    if (left >= Kernel::kMaxRows)
      group(Count<Kernel::kMaxRows>());
    else if (left >= 4)
      group(Count<4>());
    else if (left == 3)
      group(Count<3>());
    else if (left == 2)
      group(Count<2>());
    else
      group(Count<1>());
  }
}

// Few query rows: key blocks outside, kv heads inside, so that a page is read whole.
template <class Kernel>
void direct_item(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
                 char* memory) {
  const int64_t group = args.num_heads / args.num_kv_heads, rows = item.num_tokens * group;
  const int64_t heads = item.head_end - item.head_begin, lanes = acc_dim(args);
  const int64_t query_ld = Kernel::query_size(args.head_dim), widest = round_up(args.head_dim, 64);
  Carver carver{memory};
  const Scratch s = Scratch::carve(carver, args, heads * rows);
  __builtin_memset(s.zeros, 0, (widest > lanes ? widest : lanes) * 4);
  __builtin_memset(s.acc, 0, heads * rows * lanes * sizeof(float));
  __builtin_memset(s.sum, 0, heads * rows * W * sizeof(float));
  for (int64_t r = 0; r < heads * rows; ++r) s.max[r] = kNegInf;
  auto* query = (typename Kernel::Query*)s.query;
  for (int64_t i = 0; i < heads * rows; ++i) {
    const int64_t head = (item.head_begin + i / rows) * group + i % rows % group;
    Kernel::load_query(args.dtype, query_row(args, seq.query_begin + item.token_begin + i % rows / group, head),
                       args.head_dim, query + i * query_ld);
  }

  const Sight sight(args, seq, item);
  constexpr bool quantized = is_quantized(Kernel::kStorage);
  UnitScales scales;
  LogitRule rule{args.softmax_scale, args.logits_soft_cap};
  if (quantized) {
    rule.key_scale = scales.key;
    rule.value_scale = scales.value;
  }
  Poisoned poisoned(s.zeros);
  // Units in the order of their blocks, heads inside; the rows of a unit are prefetched two units ahead.
  KeyBlock blocks[3];
  UnitRows units[3];
  const auto locate = [&](int64_t n) {
    KeyBlock& block = blocks[n / heads % 3];
    if (n == 0)
      next_block(args, seq, item, sight, item.key_begin / kBlockKeys * kBlockKeys, block);
    else if (n % heads == 0)
      next_block(args, seq, item, sight, blocks[(n / heads - 1) % 3].key0 + kBlockKeys, block);
    locate_unit(args, block, item.head_begin + n % heads, s.zeros, units[n % 3]);
  };
  RowSight sights[kMaxDirectRows];
  uint64_t seen = 0, common = 0;
  locate(0);
  locate(1);
  for (int64_t n = 0; blocks[n / heads % 3].live; ++n) {
    locate(n + 2);
    const KeyBlock& block = blocks[n / heads % 3];
    const int64_t h = n % heads, head = item.head_begin + h;
    UnitRows& unit = units[n % 3];
    const UnitRows& next = units[(n + 2) % 3];

    if (h == 0 || args.attn_mask) {
      seen = 0;
      common = ~0ull;
      for (int64_t r = 0; r < rows; ++r) {
        sights[r].bits = row_bits(args, seq, item, sight, head, r, group, block.key0);
        sights[r].distance = sight.positions[r / group] - block.key0;
        seen |= sights[r].bits;
        common &= sights[r].bits;
      }
    }
    for (int64_t r = 0; r < rows; ++r)
      sights[r].slope = args.alibi_slopes ? args.alibi_slopes[head * group + r % group] : 0.0f;
    if (!seen) continue;
    if (seen != block.live) point_dead_keys(~seen, s.zeros, unit);
    if (quantized) scales.load(args, block, head);
    if constexpr (Kernel::kStorage == DType::i8 && !Kernel::kStages)
      if (args.cache.scale_stride_token) Kernel::drop_zero_rows(unit, args.value_dim, scales.value);
    const int64_t at = h * rows;
    const auto run = [&](auto kernel, int64_t key_dim, int64_t value_dim) {
      direct_unit<decltype(kernel)>(args, key_dim, value_dim, unit, next, seen, common, poisoned, rule,
                                    query + at * query_ld, query_ld, rows, sights, s.logits, s.max + at, s.sum + at * W,
                                    s.acc + at * lanes);
    };
    if constexpr (Kernel::kStages) {
      // Some keys lie beside the cache, in another type, or the rows would widen every key several times.
      if ((block.live & ~low_bits(block.split)) || rows > Kernel::kRowsInPlace) {
        using Staged = typename Kernel::Staged;
        const int64_t key_dim = round_up(args.head_dim, Kernel::kStagedPad);
        const int64_t value_dim = round_up(args.value_dim, Kernel::kStagedPad);
        stage_rows<Staged::kStorage>(args, block, s.zeros, args.head_dim, widest, s.staged_key, unit.key, unit.count);
        stage_rows<Staged::kStorage>(args, block, s.zeros, args.value_dim, lanes, s.staged_value, unit.value,
                                     unit.count);
        Kernel::arrange(s.staged_key, unit.count * widest);
        Kernel::arrange(s.staged_value, unit.count * lanes);
        run(Staged(), key_dim, value_dim);
        continue;
      }
    }
    run(Kernel(), args.head_dim, args.value_dim);
  }
  for (int64_t i = 0; i < heads * rows; ++i) s.sum[i] = hsum(loadu(s.sum + i * W));
  for (int64_t h = 0; h < heads; ++h)
    write_rows<Kernel>(args, seq, item, item.head_begin + h, partials, s.max + h * rows, s.sum + h * rows,
                       s.acc + h * rows * lanes);
}

template <template <DType> class Kernel>
void direct_quantized(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
                      char* scratch) {
  switch (args.cache.dtype) {
    case DType::i8:
      return direct_item<Kernel<DType::i8>>(args, seq, item, partials, scratch);
    case DType::e4m3:
      return direct_item<Kernel<DType::e4m3>>(args, seq, item, partials, scratch);
    default:
      return direct_item<Kernel<DType::e5m2>>(args, seq, item, partials, scratch);
  }
}

#if defined(__AVX512BF16__)
// Integer products take finite 16-bit queries, and keys that are all in the cache. All heads decide alike, so that the
// cut of an item does not matter.
template <DType S>
bool has_finite_queries(const AttentionArgs& args, const Sequence& seq, const Item& item) {
  for (int64_t i = 0; i < item.num_tokens * args.num_heads; ++i) {
    const int64_t token = seq.query_begin + item.token_begin + i / args.num_heads;
    if (!is_finite<S>(query_row(args, token, i % args.num_heads), args.head_dim)) return false;
  }
  return true;
}

bool fits_integers(const AttentionArgs& args, const Sequence& seq, const Item& item) {
  if (item.tile || !args.has_cache || args.cache.dtype != DType::i8 || args.has_new) return false;
  if (args.dtype == DType::bf16) return has_finite_queries<DType::bf16>(args, seq, item);
  return args.dtype == DType::f16 && has_finite_queries<DType::f16>(args, seq, item);
}
#endif

void attention_item(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
                    char* scratch, Stop* stop) {
  const bool quantized = args.has_cache && is_quantized(args.cache.dtype);
#if defined(__AVX512BF16__)
  if (fits_integers(args, seq, item)) return direct_item<RowsInt8>(args, seq, item, partials, scratch);
  if (args.dtype == DType::bf16) {
    if (item.tile) return tile_item<TileDot>(args, seq, item, partials, scratch, stop);
    if (quantized) return direct_quantized<RowsBytes>(args, seq, item, partials, scratch);
    return direct_item<RowsDot>(args, seq, item, partials, scratch);
  }
#endif
  if (item.tile) return tile_item<TileF32>(args, seq, item, partials, scratch, stop);
  if (quantized) return direct_quantized<RowsF32>(args, seq, item, partials, scratch);
  switch (args.dtype) {
    case DType::f32:
      return direct_item<RowsF32<DType::f32>>(args, seq, item, partials, scratch);
    case DType::bf16:
      return direct_item<RowsF32<DType::bf16>>(args, seq, item, partials, scratch);
    default:
      return direct_item<RowsF32<DType::f16>>(args, seq, item, partials, scratch);
  }
}

void attention_merge(const AttentionArgs& args, const Sequence& seq, int64_t head, const Partials& partials) {
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
      const float left = max == kNegInf ? 1.0f : __builtin_expf(max - base);
      const float right = other == kNegInf ? 1.0f : __builtin_expf(other - base);
      sum = sum * left + partials.sum[at] * right;
      for (int64_t j = 0; j < lanes; j += W)
        storeu(acc + j, loadu(acc + j) * left + loadu(partials.acc + at * lanes + j) * right);
      max = top;
    }
    write_row<RowsF32<DType::f32>>(args, seq.query_begin + r / group, head * group + r % group, max, sum, acc);
  }
}

int64_t attention_scratch_bytes(const AttentionArgs& args, int64_t direct_rows, int64_t tile_rows) {
  Carver direct{nullptr}, tile{nullptr};
  if (direct_rows > 0) Scratch::carve(direct, args, direct_rows);
  if (tile_rows > 0) TileScratch::carve(tile, args, tile_rows);
  return direct.used > tile.used ? direct.used : tile.used;
}

}  // namespace
}  // namespace torch_paged
