#pragma once

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

}  // namespace torch_paged
