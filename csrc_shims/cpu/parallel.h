// Threads, through OpenMP: the extension shares the runtime, and so the thread count, of torch.
#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>

namespace torch_paged {

// How many threads a call of that many bytes of work deserves.
inline int threads_for(int64_t work_bytes) {
  constexpr int64_t kBytesPerThread = 64 * 1024;
  if (omp_in_parallel()) return 1;
  const int64_t useful = 1 + work_bytes / kBytesPerThread;
  return useful < omp_get_max_threads() ? (int)useful : omp_get_max_threads();
}

// body(i) for i in [0, count), handed out one by one. The first exception reaches the caller after the loop: it
// must not leave the parallel region by itself.
template <class Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::exception_ptr error;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical
      if (!error) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

}  // namespace torch_paged
