// The scratch memory of a work item, and what fills it before the first key block.
#pragma once

#include "plan.h"
#include "rows.h"

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

// Few query rows. Rows = query rows of all kv heads of the item.
struct Scratch {
  float *acc, *max, *sum, *logits;
  char* query;
  char *staged_key, *staged_value;
  char* zeros;

  static Scratch carve(Carver& c, const AttentionArgs& args, int64_t rows) {
    const int64_t dim = round_up(args.head_dim, 64), acc = acc_dim(args), widest = dim > acc ? dim : acc;
    Scratch s;
    s.acc = c.take<float>(rows * acc);
    s.max = c.take<float>(rows);
    s.sum = c.take<float>(rows * W);  // a vector of partial sums for each row
    s.query = c.take<char>(rows * dim * 4);
    s.logits = c.take<float>(64 * kMaxDirectRows);
    s.staged_key = c.take<char>(64 * widest * 4);
    s.staged_value = c.take<char>(64 * widest * 4);
    s.zeros = c.take<char>(widest * 4);
    return s;
  }
};

TP_INLINE const char* query_row(const AttentionArgs& args, int64_t token, int64_t head) {
  return (const char*)args.query.data +
         (token * args.query.stride_token + head * args.query.stride_head) * element_size(args.dtype);
}

}  // namespace
}  // namespace torch_paged
