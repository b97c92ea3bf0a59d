// Threads, through OpenMP: the extension shares the runtime, and so the thread count, of torch.
#pragma once

#include <omp.h>
#include <pthread.h>

#include <atomic>
#include <cfenv>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>

#include "plan.h"

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

#if !defined(TORCH_PAGED_POLL_MS)
#define TORCH_PAGED_POLL_MS 100
#endif

namespace torch_paged {

// How many threads a call of that many bytes of work deserves. One in a forked child: the runtime would wait for
// threads that only its parent has.
int threads_for(int64_t work_bytes);

// Ends a call early. The thread that made it asks `poll` now and then, which throws what the caller is to see; the
// others look at a flag.
class Stop {
 public:
  explicit Stop(void (*poll)()) : poll_(poll), caller_(pthread_self()), due_(Clock::now() + kInterval) {}

  // Whether the call has ended. To be asked between pieces of work; throws on the calling thread.
  bool look();
  void end() { ended_.store(true, std::memory_order_relaxed); }

  // Another thread has no work left.
  void leave();
  // Polls until so many threads have left.
  void wait_for(int threads);

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::milliseconds kInterval{TORCH_PAGED_POLL_MS};
  static constexpr int kLooks = 8;  // from one look at the clock to the next

  void (*const poll_)();
  const pthread_t caller_;
  Clock::time_point due_;
  int looks_ = 0, left_ = 0;
  std::atomic<bool> ended_{false};
  std::mutex mutex_;
  std::condition_variable someone_left_;
};

// What the calling thread makes of subnormal numbers and of rounding, the others do too, so that bits do not depend on
// who computes them; afterwards each goes on as before.
class FloatModeOf {
 public:
  explicit FloatModeOf(const std::fenv_t& caller) {
    std::fegetenv(&own_);
    std::fesetenv(&caller);
  }
  ~FloatModeOf() { std::fesetenv(&own_); }
  FloatModeOf(const FloatModeOf&) = delete;

 private:
  std::fenv_t own_;
};

// For a call that is over soon.
struct NoStop {
  static constexpr bool look() { return false; }
  static void end() {}
  static void leave() {}
  static void wait_for(int) {}
};

// body(i) for i in [0, count), handed out one by one. The first exception ends the loop and reaches the caller after
// it: it must not leave the parallel region by itself.
template <class Body, class AnyStop = NoStop>
void parallel_for(int64_t count, int threads, const Body& body, AnyStop&& stop = {}) {
  if (threads <= 1 || count <= 1) {
    for (int64_t i = 0; i < count && !stop.look(); ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex mutex;
  const auto guarded = [&](const auto& work) {
    try {
      work();
    } catch (...) {
      next.store(count, std::memory_order_relaxed);
      stop.end();
      const std::lock_guard<std::mutex> lock(mutex);
      if (!error) error = std::current_exception();
    }
  };
  std::fenv_t caller;
  std::fegetenv(&caller);
  const auto member = [&](int thread, int team) {
    const FloatModeOf mode(caller);
    guarded([&] {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count && !stop.look();) body(i);
    });
    if (thread > 0)
      stop.leave();
    else
      guarded([&] { stop.wait_for(team - 1); });
  };
#if defined(TP_PLAIN_THREADS)  // ThreadSanitizer does not know OpenMP's barriers
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(member, thread, threads);
  member(0, threads);
  for (std::thread& other : others) other.join();
#else
#pragma omp parallel num_threads(threads)
  member(omp_get_thread_num(), omp_get_num_threads());
#endif
  if (error) std::rethrow_exception(error);
}

// Lends what a thread keeps from call to call, so that a small call does not pay for allocations. Kept is empty while
// it is lent: a signal handler may call an op in the midst of another.
template <class T>
class Loan {
 public:
  explicit Loan(T& kept) : kept_(kept), lent_(std::move(kept)) {}
  ~Loan() { kept_ = std::move(lent_); }
  Loan(const Loan&) = delete;
  T& operator*() { return lent_; }

 private:
  T& kept_;
  T lent_;
};

}  // namespace torch_paged
