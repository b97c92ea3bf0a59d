// What the machine can do at most, for the kernels to be compared with: reading memory, and multiply-adds in registers.
// Built by limits.py for the machine that runs it.
#include <cstdint>

#if defined(__AVX512F__)
#include <immintrin.h>
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

namespace {

typedef long long Integers __attribute__((vector_size(kVectorBytes), aligned(1), may_alias));
typedef float Floats __attribute__((vector_size(kVectorBytes)));

constexpr int kChains = 12;  // independent chains, enough to hide the latency of a multiply-add
constexpr int kStep = 256;

volatile long long sink;

inline __attribute__((always_inline)) void prefetch(const char* address) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 %0" ::"m"(*address));
#else
  __builtin_prefetch(address, 0, 2);
#endif
}

// Reads a run while the lines of another one are prefetched beside it.
Integers read(const char* run, int64_t bytes, const char* next, int64_t next_bytes, Integers sum) {
  Integers sums[4] = {sum};
  int64_t at = 0;
  for (; at + kStep <= bytes; at += kStep) {
    for (int64_t line = at; line < at + kStep && line < next_bytes; line += 64) prefetch(next + line);
    for (int i = 0; i < kStep / kVectorBytes; ++i)
      sums[i % 4] ^= *reinterpret_cast<const Integers*>(run + at + i * kVectorBytes);
  }
  for (; at < bytes; at += 8) sums[0][0] ^= *reinterpret_cast<const int64_t*>(run + at);
  return (sums[0] ^ sums[1]) ^ (sums[2] ^ sums[3]);
}

void swallow(Integers sum) {
  long long all = 0;
  for (int i = 0; i < kVectorBytes / 8; ++i) all ^= sum[i];
  sink = all;
}

template <class Step>
void chains(int64_t steps, int threads, const Step& step) {
#pragma omp parallel num_threads(threads)
  {
    Floats sums[kChains];
    for (int k = 0; k < kChains; ++k) sums[k] = Floats{} + (float)k;  // equal chains would be merged into one
    for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
      for (int k = 0; k < kChains; ++k) sums[k] = step(sums[k]);
      asm volatile("");
    }
    Floats all = {};
    for (const Floats& sum : sums) all += sum;
    sink = (long long)all[0];
  }
}

}  // namespace

extern "C" {

// Runs start at base + offsets[i]; the run that is `ahead` further on is prefetched, none where it is 0.
void read_runs(const char* base, const int64_t* offsets, const int64_t* bytes, int64_t count, int64_t ahead,
               int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int part = 0; part < threads; ++part) {
    const int64_t begin = count * part / threads, end = count * (part + 1) / threads;
    Integers sum = {};
    for (int64_t i = begin; i < end; ++i) {
      const int64_t next = i + ahead < end ? i + ahead : i;
      sum = read(base + offsets[i], bytes[i], base + offsets[next], next == i ? 0 : bytes[next], sum);
    }
    swallow(sum);
  }
}

// The floating-point operations of one step on one thread; `bfloat16` is ignored where no dot product of it exists.
int64_t flops_per_step(int bfloat16) {
#if defined(__AVX512BF16__)
  if (bfloat16) return kChains * kVectorBytes / 4 * 4;
#endif
  return kChains * kVectorBytes / 4 * 2;
}

void multiply_add(int64_t steps, int bfloat16, int threads) {
#if defined(__AVX512BF16__)
  if (bfloat16) {
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
    return chains(steps, threads, [&](Floats x) { return (Floats)_mm512_dpbf16_ps((__m512)x, ones, ones); });
  }
#endif
  const Floats factor = Floats{} + 0.999f, term = Floats{} + 1e-3f;
  chains(steps, threads, [&](Floats x) { return x * factor + term; });
}
}
