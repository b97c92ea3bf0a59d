// Threads, through OpenMP: the extension shares the runtime, and so the thread count, of torch.
#pragma once

#include <omp.h>

#include <cstdint>
#include <exception>

#if defined(__SANITIZE_THREAD__)
#define TP_PLAIN_THREADS
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define TP_PLAIN_THREADS
#endif
#endif
#if defined(TP_PLAIN_THREADS)
#include <thread>
#include <vector>
#endif

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
  const auto guarded = [&](int64_t i) {
    try {
      body(i);
    } catch (...) {
#pragma omp critical
      if (!error) error = std::current_exception();
    }
  };
#if defined(TP_PLAIN_THREADS)  // ThreadSanitizer does not know OpenMP's barriers
  std::vector<std::thread> team;
  for (int first = 0; first < threads; ++first)
    team.emplace_back([&guarded, first, threads, count] {
      for (int64_t i = first; i < count; i += threads) guarded(i);
    });
  for (std::thread& member : team) member.join();
#else
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) guarded(i);
#endif
  if (error) std::rethrow_exception(error);
}

}  // namespace torch_paged
