#pragma once

#include <cstdint>

namespace torch_paged {

// An ordinary prefetch builtin may be deleted with the loop around it; a volatile one is not.
static inline __attribute__((always_inline)) void prefetch_l1(const char* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht0 %0" ::"m"(*p));
#else
  __builtin_prefetch(p, 0, 3);
#endif
}

static inline __attribute__((always_inline)) void prefetch_l2(const char* p) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" ::"m"(*p));
#else
  __builtin_prefetch(p, 0, 2);
#endif
}

static inline __attribute__((always_inline)) void prefetch_for_write(const char* p) {
#if defined(__AVX2__)
  asm volatile("prefetchw %0" ::"m"(*p));
#else
  __builtin_prefetch(p, 1, 2);
#endif
}

// All lines of a row.
static inline __attribute__((always_inline)) void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch_l2(row + i);
}

static inline __attribute__((always_inline)) void prefetch_row_l1(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch_l1(row + i);
}

}  // namespace torch_paged
