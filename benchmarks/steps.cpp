// Counts the instructions between two calls: the processor's trap flag raises a signal after each of them.
#include <csignal>
#include <cstdint>

namespace {

volatile int64_t steps;

void count(int) { steps = steps + 1; }

}  // namespace

extern "C" void begin_steps() {
  struct sigaction action = {};
  action.sa_handler = count;
  sigaction(SIGTRAP, &action, nullptr);
  steps = 0;
  asm volatile("pushfq; orq $0x100, (%%rsp); popfq" ::: "memory", "cc");
}

extern "C" int64_t end_steps() {
  asm volatile("pushfq; andq $~0x100, (%%rsp); popfq" ::: "memory", "cc");
  return steps;
}
