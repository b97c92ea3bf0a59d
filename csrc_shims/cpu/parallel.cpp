#include "parallel.h"

namespace torch_paged {

namespace {

bool forked = false;
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

}  // namespace

int threads_for(int64_t work_bytes) {
  constexpr int64_t kBytesPerThread = 64 * 1024;
  if (forked || omp_in_parallel()) return 1;
  const int64_t useful = 1 + work_bytes / kBytesPerThread;
  return useful < omp_get_max_threads() ? (int)useful : omp_get_max_threads();
}

bool Stop::look() {
  if (ended_.load(std::memory_order_relaxed)) return true;
  if (!pthread_equal(caller_, pthread_self()) || ++looks_ % kLooks != 0) return false;
  const Clock::time_point now = Clock::now();
  if (now < due_) return false;
  due_ = now + kInterval;
  poll_();
  return false;
}

void Stop::leave() {
  const std::lock_guard<std::mutex> lock(mutex_);
  ++left_;
  someone_left_.notify_one();
}

void Stop::wait_for(int threads) {
  std::unique_lock<std::mutex> lock(mutex_);
  while (left_ < threads) {
    // By the system's clock: waiting by the other one would need a newer libc.
    const auto due = std::chrono::system_clock::now() + kInterval;
    if (someone_left_.wait_until(lock, due) == std::cv_status::no_timeout) continue;
    lock.unlock();
    if (!ended_.load(std::memory_order_relaxed)) poll_();
    lock.lock();
  }
}

bool has_ended(Stop* stop) { return stop != nullptr && stop->look(); }

}  // namespace torch_paged
