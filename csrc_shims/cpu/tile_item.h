// One work item of many query rows of one kv head: the keys and values of a block are packed once and serve all rows of
// the tile, a few rows at a time. Within a block all logits and probabilities come first, then all sums of values, so
// that one packed matrix at a time stays in L1; accumulators and probabilities of the tile stay in L2. While a block is
// computed the rows of the next one are prefetched.
#pragma once

#include "keys.h"
#include "scratch.h"
#include "softmax.h"
#include "tile.h"

namespace torch_paged {
namespace {

// Of one register tile: the keys [begin, end) of the block that some of its rows see; begin is a multiple of 16.
struct KeyRange {
  uint8_t begin, end;
  bool loaded, started;  // the queries lie in scratch; the accumulator holds a sum
};

// Rows are padded to whole register tiles: of kTileRowsAtOnce, then of 4 or 2 rows.
struct TileScratch {
  float *acc, *max, *sum, *shrink, *logits;
  uint32_t *query, *probabilities;
  char *staged_key, *staged_value;
  uint32_t *packed_key, *packed_value;
  uint64_t* bits;
  int32_t* tokens;  // of each row
  KeyRange* ranges;
  char* zeros;

  static TileScratch carve(Carver& c, const AttentionArgs& args, int64_t rows) {
    const int64_t padded = round_up(rows, 2);
    const int64_t dim = round_up(args.head_dim, 64), acc = acc_dim(args), widest = dim > acc ? dim : acc;
    TileScratch s;
    s.acc = c.take<float>(padded * acc);
    s.max = c.take<float>(padded + W);  // and whole vectors from any row on
    s.sum = c.take<float>(padded * W);
    s.shrink = c.take<float>(padded + W);
    s.logits = c.take<float>(kTileRowsAtOnce * 64);
    s.query = c.take<uint32_t>(padded * dim);
    s.probabilities = c.take<uint32_t>(padded * 64);
    s.staged_key = c.take<char>(64 * widest * 4);
    s.staged_value = c.take<char>(64 * widest * 4);
    s.packed_key = c.take<uint32_t>(64 * dim);
    s.packed_value = c.take<uint32_t>(64 * acc);
    s.bits = c.take<uint64_t>(padded);
    s.tokens = c.take<int32_t>(padded);
    s.ranges = c.take<KeyRange>(padded / 2);
    s.zeros = c.take<char>(widest * 4);
    return s;
  }
};

constexpr int64_t kRowsAhead = 16;  // query and output rows are prefetched so far ahead

// body(Count, first row) for each register tile of the rows.
template <class Body>
TP_INLINE void for_register_tiles(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + kTileRowsAtOnce <= rows; r += kTileRowsAtOnce) body(Count<kTileRowsAtOnce>(), r);
  if (rows - r > 2) {
    body(Count<4>(), r);
    r += 4;
  }
  if (r < rows) body(Count<2>(), r);
}

// The largest lane of each of MR <= 8 vectors, in the first lanes of vectors of W.
template <int MR>
TP_INLINE void largest_lanes(const vf* x, vf* largest) {
#if defined(__AVX512F__)
  __m512 b[4], c[2];
  TP_UNROLL
  for (int i = 0; i < 4; ++i) {
    const vf y = x[2 * i < MR ? 2 * i : 0], z = x[2 * i < MR ? 2 * i + 1 : 1];
    b[i] = vmax(_mm512_unpacklo_ps(y, z), _mm512_unpackhi_ps(y, z));
  }
  TP_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m512d y = _mm512_castps_pd(b[2 * i]), z = _mm512_castps_pd(b[2 * i + 1]);
    c[i] = vmax((vf)_mm512_unpacklo_pd(y, z), (vf)_mm512_unpackhi_pd(y, z));
  }
  const vf d = vmax(_mm512_shuffle_f32x4(c[0], c[1], 0x88), _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
  const vf e = vmax(d, _mm512_shuffle_f32x4(d, d, 0xb1));
  largest[0] = _mm512_shuffle_f32x4(e, e, 0x08);
#else
  TP_UNROLL
  for (int m = 0; m < MR; ++m) largest[m / W][m % W] = hmax(x[m]);
#endif
}

// Logits (MR, 64) become probabilities: exp2 of factor * logit less the running maximum, which moves on first; the
// factors by which that shrinks earlier sums are left in `shrink`. top: largest logits of each lane, in base e. A row's
// sum is kept in W lanes.
template <class Kernel, int MR, bool kAll>
TP_INLINE void exponentiate(const float* s, const vf* top, float factor, const float* value_scale, const uint64_t* bits,
                            int begin, int end, float* max, float* shrink, float* sum, uint32_t* p) {
  constexpr int kVectors = (MR + W - 1) / W;
  alignas(64) float base[kVectors * W];
  vf largest[kVectors];
  largest_lanes<MR>(top, largest);
  TP_UNROLL
  for (int i = 0; i < kVectors; ++i) {
    const vf old = loadu(max + i * W);
    const vf larger = vmax(largest[i], old);  // the old one where the new one is NaN
    const vf now = select_bits((uint32_t)(low_bits(MR) >> i * W), larger, old);
    const vf finite = now == kNegInf ? vf{} : now;
    storeu(max + i * W, now);
    storeu(base + i * W, finite * kLog2E);
    storeu(shrink + i * W, vexp2((old - finite) * kLog2E));  // exactly 1 where the maximum stays
  }
  vf total[MR];
  TP_UNROLL
  for (int m = 0; m < MR; ++m) total[m] = loadu(sum + m * W) * shrink[m];
  TP_UNROLL
  for (int i = begin; i < end; i += W) {
    TP_UNROLL
    for (int m = 0; m < MR; ++m) {
      const vf x = loadu(s + m * 64 + i) * factor - base[m];
      vf e = vexp2(kAll ? x : select_bits((uint32_t)(bits[m] >> i), x, set1(kNegInf)));
      total[m] = total[m] + e;
      if (value_scale) e = select_bits((uint32_t)(bits[m] >> i), e * loadu(value_scale + i), vf{});
      Kernel::put_probabilities(p + m * (64 / Kernel::kLanesPerWord), i, e);
    }
  }
  TP_UNROLL
  for (int m = 0; m < MR; ++m) storeu(sum + m * W, total[m]);
}

// Logits that are products times a scale > 0 and nothing more.
template <class Kernel, int MR, bool kAll>
TP_INLINE void plain_softmax(float scale, const uint64_t* bits, int begin, int end, const float* s, float* max,
                             float* shrink, float* sum, uint32_t* p) {
  vf top[MR];
  TP_UNROLL
  for (int m = 0; m < MR; ++m) top[m] = set1(kNegInf);
  TP_UNROLL
  for (int i = begin; i < end; i += W) {
    TP_UNROLL
    for (int m = 0; m < MR; ++m) {
      const vf x = loadu(s + m * 64 + i);
      top[m] = vmax(kAll ? x : select_bits((uint32_t)(bits[m] >> i), x, set1(kNegInf)), top[m]);
    }
  }
  TP_UNROLL
  for (int m = 0; m < MR; ++m) top[m] = top[m] * scale;
  exponentiate<Kernel, MR, kAll>(s, top, scale * kLog2E, nullptr, bits, begin, end, max, shrink, sum, p);
}

// Poisoned values in the kernel's type: the rows that see them add them one by one.
template <class Kernel>
TP_INLINE void take_poisoned(const AttentionArgs& args, DType stored, uint64_t seen, uint64_t common, char* staged,
                             UnitRows& unit, Poisoned& poisoned) {
  const int64_t lanes = acc_dim(args);
  poisoned.keys = 0;
  if (seen == common) return;
  switch (stored) {
    case DType::f32:
      poisoned.take<DType::f32>(seen, common, args.value_dim, unit);
      break;
    case DType::bf16:
      poisoned.take<DType::bf16>(seen, common, args.value_dim, unit);
      break;
    case DType::f16:
      poisoned.take<DType::f16>(seen, common, args.value_dim, unit);
      break;
    case DType::i8:
      break;
    case DType::e4m3:
      poisoned.take<DType::e4m3>(seen, common, args.value_dim, unit);
      break;
    default:
      poisoned.take<DType::e5m2>(seen, common, args.value_dim, unit);
      break;
  }
  if (stored == Kernel::kStorage) return;
  for (uint64_t left = poisoned.keys; left; left &= left - 1) {
    const int i = __builtin_ctzll(left);
    char* row = staged + i * lanes * size_of<Kernel::kStorage>();
    convert_row<Kernel::kStorage>(stored, poisoned.rows.value[i], args.value_dim, lanes, row);
    poisoned.rows.value[i] = row;
  }
}

// Rows that are needed soon come to L2, a few between two register tiles: all at once would stall the products.
class Ahead {
 public:
  Ahead(const char* const* rows, int count, int64_t row_bytes, int64_t query_rows)
      : rows_(rows), count_(count), row_bytes_(row_bytes), step_(count / (int)(query_rows / kTileRowsAtOnce + 1) + 1) {}

  TP_INLINE void fetch_some() {
    for (const int stop = at_ + step_ < count_ ? at_ + step_ : count_; at_ < stop; ++at_)
      prefetch_row(rows_[at_], row_bytes_);
  }

 private:
  const char* const* rows_;
  int count_;
  int64_t row_bytes_;
  int at_ = 0, step_;
};

// The state of a tile. Row r = token r / group, head r % group.
template <class Kernel>
struct Tile {
  static constexpr int kProbabilityWords = 64 / Kernel::kLanesPerWord;

  const AttentionArgs& args;
  const Sequence& seq;
  const Item& item;
  const int64_t group, head, rows, lanes, query_ld;
  const TileScratch s;
  const Sight sight;
  const bool quantized, plain;
  UnitScales scales;
  LogitRule rule;
  Poisoned poisoned;
  bool all = false;  // plain, and every row sees every key of the block: s.bits is not filled

  Tile(const AttentionArgs& args, const Sequence& seq, const Item& item, char* memory)
      : args(args),
        seq(seq),
        item(item),
        group(args.num_heads / args.num_kv_heads),
        head(item.head_begin),
        rows(item.num_tokens * group),
        lanes(acc_dim(args)),
        query_ld(round_up(args.head_dim, W * Kernel::kLanesPerWord) / Kernel::kLanesPerWord),
        s(carve(args, rows, memory)),
        sight(args, seq, item),
        quantized(args.has_cache && is_quantized(args.cache.dtype)),
        plain(!quantized && !args.alibi_slopes && args.logits_soft_cap == 0.0f && args.softmax_scale > 0.0f),
        rule{args.softmax_scale, args.logits_soft_cap},
        poisoned(s.zeros) {
    if (quantized) {
      rule.key_scale = scales.key;
      rule.value_scale = scales.value;
    }
    const int64_t padded = round_up(rows, 2), dim = round_up(args.head_dim, 64);
    __builtin_memset(s.zeros, 0, (dim > lanes ? dim : lanes) * 4);
    __builtin_memset(s.sum, 0, padded * W * sizeof(float));
    __builtin_memset(s.ranges, 0, padded / 2 * sizeof(KeyRange));
    for (int64_t r = 0; r < padded; ++r) s.max[r] = kNegInf;
    for (int64_t t = 0, r = 0; r < padded; ++t)
      for (int64_t g = 0; g < group && r < padded; ++g, ++r) s.tokens[r] = (int32_t)t;
  }

  static TileScratch carve(const AttentionArgs& args, int64_t rows, char* memory) {
    Carver carver{memory};
    return TileScratch::carve(carver, args, rows);
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

  TP_INLINE void load_queries(int64_t begin, int64_t count) {
    const int64_t row_bytes = args.head_dim * element_size(args.dtype);
    for (int64_t r = begin; r < begin + count; ++r) {
      if (r >= rows) {
        __builtin_memset(s.query + r * query_ld, 0, query_ld * 4);
        continue;
      }
      if (r + kRowsAhead < rows) prefetch_row(query_at(r + kRowsAhead), row_bytes);
      load_words<Kernel>(args.dtype, query_at(r), args.head_dim, s.query + r * query_ld);
    }
  }
  int64_t token_at(int64_t r) const { return seq.query_begin + item.token_begin + s.tokens[r]; }
  int64_t head_at(int64_t r) const { return head * group + r - s.tokens[r] * group; }
  const char* query_at(int64_t r) const { return query_row(args, token_at(r), head_at(r)); }

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
    const int end = (int)round_up(keys.end, 16);
    if (!keys.loaded) load_queries(r, MR);
    keys.loaded = true;
    const int64_t words = (args.head_dim + Kernel::kLanesPerWord - 1) / Kernel::kLanesPerWord;
    logits<Kernel, MR>(s.query + r * query_ld, query_ld, s.packed_key, words, keys.begin, end, s.logits);
    uint32_t* p = s.probabilities + r * kProbabilityWords;
    float *max = s.max + r, *shrink = s.shrink + r, *sum = s.sum + r * W;
    if (plain && every == ~0ull)
      return plain_softmax<Kernel, MR, true>(rule.scale, nullptr, 0, 64, s.logits, max, shrink, sum, p);
    if (plain)
      return plain_softmax<Kernel, MR, false>(rule.scale, s.bits + r, keys.begin, end, s.logits, max, shrink, sum, p);
    vf top[MR];
    for (int i = 0; i < MR; ++i) {
      const RowSight row{s.bits[r + i], sight.positions[s.tokens[r + i]] - block.key0,
                         args.alibi_slopes ? args.alibi_slopes[head_at(r + i)] : 0.0f};
      top[i] = masked_logits(rule, row, block.count, s.logits + i * 64);
    }
    exponentiate<Kernel, MR, false>(s.logits, top, 1.0f, rule.value_scale, s.bits + r, keys.begin, end, max, shrink,
                                    sum, p);
  }

  // Sums of values for MR rows from r on.
  template <int MR>
  TP_INLINE void sum_up(int64_t r, const KeyBlock& block) {
    KeyRange& keys = s.ranges[r / 2];
    if (keys.end == 0) return;
    const uint32_t* p = s.probabilities + r * kProbabilityWords;
    accumulate<Kernel, MR>(p, s.packed_value, lanes, keys.begin, keys.end, round_up(args.value_dim, Kernel::kValuePad),
                           s.shrink + r, !keys.started, s.acc + r * lanes);
    keys.started = true;
    if (poisoned.keys == 0) return;
    for (int i = 0; i < MR; ++i) {
      alignas(64) float weights[64];
      Kernel::get_probabilities(p + i * kProbabilityWords, weights);
      for (int k = 0; k < 64; ++k)  // those of other keys were not written
        if (!(s.bits[r + i] >> k & 1)) weights[k] = 0.0f;
      poisoned.add<typename Kernel::Direct>(s.bits[r + i], block.count, weights, args.value_dim,
                                            s.acc + (r + i) * lanes, lanes);
    }
  }

  // `count` rows from r on leave the tile.
  TP_INLINE void finish(int64_t r, int64_t count, const Partials& partials) {
    if (!s.ranges[r / 2].started) __builtin_memset(s.acc + r * lanes, 0, count * lanes * sizeof(float));
    const int64_t end = r + count < rows ? r + count : rows;
    for (; r < end; ++r) {
      const float sum = hsum(loadu(s.sum + r * W));
      const float* acc = s.acc + r * lanes;
      if (item.partial < 0) {
        if (r + kRowsAhead < rows) prefetch_output(r + kRowsAhead);
        write_row<Kernel>(args, token_at(r), head_at(r), s.max[r], sum, acc);
      } else {
        const int64_t to = item.partial + head * rows + r;
        for (int64_t i = 0; i < lanes; i += W) storeu(partials.acc + to * lanes + i, Kernel::natural(acc, i));
        partials.max[to] = s.max[r];
        partials.sum[to] = sum;
      }
    }
  }
  TP_INLINE void prefetch_output(int64_t r) const {
    const int64_t row_bytes = args.value_dim * element_size(args.dtype);
    const char* out = (const char*)args.out + (token_at(r) * args.num_heads + head_at(r)) * row_bytes;
    for (int64_t i = 0; i < row_bytes; i += 64) prefetch_for_write(out + i);
  }
};

// Many query rows of one kv head.
template <class Kernel>
void tile_item(const AttentionArgs& args, const Sequence& seq, const Item& item, const Partials& partials,
               char* memory) {
  Tile<Kernel> tile(args, seq, item, memory);
  const TileScratch& s = tile.s;
  const int64_t head = tile.head, rows = tile.rows, lanes = tile.lanes, widest = round_up(args.head_dim, 64);
  KeyBlock blocks[2];
  UnitRows units[2];
  next_block(args, seq, item, tile.sight, item.key_begin / kBlockKeys * kBlockKeys, blocks[0]);
  locate_unit(args, blocks[0], head, s.zeros, units[0]);
  for (int i = 0; i < units[0].count; ++i)
    prefetch_row(units[0].key[i], args.head_dim * element_size(tile.stored(blocks[0])));

  bool last = false;
  for (int now = 0; !last; now = 1 - now) {
    const KeyBlock &block = blocks[now], &following = blocks[1 - now];
    UnitRows &unit = units[now], &next = units[1 - now];
    next_block(args, seq, item, tile.sight, block.key0 + kBlockKeys, blocks[1 - now]);
    locate_unit(args, following, head, s.zeros, next);
    last = !following.live;

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
      tile.template weigh<decltype(count)::value>(r, block);
    });
    take_poisoned<Kernel>(args, stored, seen, common, s.staged_value, unit, tile.poisoned);
    pack_values<Kernel>(stored, unit.value, unit.count, args.value_dim, lanes, s.packed_value);
    for_register_tiles(rows, [&](auto count, int64_t r) {
      keys.fetch_some();
      tile.template sum_up<decltype(count)::value>(r, block);
      if (last) tile.finish(r, decltype(count)::value, partials);
    });
  }
}

}  // namespace
}  // namespace torch_paged
