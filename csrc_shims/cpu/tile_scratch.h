// The scratch memory of a tile, the walk over its register tiles, and the prefetches beside it.
#pragma once

#include "scratch.h"
#include "tile.h"

namespace torch_paged {
namespace {

// Of one register tile: the keys [begin, end) of the block that some of its rows see; begin is a multiple of 16.
struct KeyRange {
  uint8_t begin, end;
  bool seen, started;  // some key was seen; the accumulator holds a sum
};

// Rows are padded to whole register tiles: of kTileRowsAtOnce, then of 4 or 2 rows.
struct TileScratch {
  float *acc, *max, *sum, *shrink, *logits;
  uint32_t *query, *probabilities;
  char *staged_key, *staged_value;
  uint32_t *packed_key, *packed_value;
  uint64_t* bits;
  int32_t* tokens;         // of each row
  int64_t* query_offsets;  // of each row, in bytes, for query head 0
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
    s.query_offsets = c.take<int64_t>(padded);
    s.ranges = c.take<KeyRange>(padded / 2);
    s.zeros = c.take<char>(widest * 4);
    return s;
  }
};

constexpr int64_t kRowsAhead = 3 * kTileRowsAtOnce;  // the first queries are prefetched so far ahead

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

}  // namespace
}  // namespace torch_paged
