// Preloaded into a process: lets one allocation fail, of those that the kernels' library asks for (by new or for
// aligned memory) and those that torch makes for a tensor (posix_memalign, which nothing else in a call asks for).
#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

namespace {

std::atomic<long> left{-1};  // allocations before the one that fails; negative: none fails
std::atomic<bool> armed{false};

bool ours(void* caller) {
  Dl_info info;
  return dladdr(caller, &info) != 0 && std::strstr(info.dli_fname, "_C.abi3.so") != nullptr;
}

bool fails() { return left.fetch_sub(1) == 0; }

template <class Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

void* allocate(std::size_t bytes, void* caller) {
  if (armed && ours(caller) && fails()) return nullptr;
  return std::malloc(bytes ? bytes : 1);
}

}  // namespace

// Lets the allocation after `allowed` others fail; returns how many of those allowed were not asked for, and -1 where
// one failed. Negative: lets none fail any more.
extern "C" long fail_after(long allowed) {
  armed = allowed >= 0;
  return left.exchange(allowed);
}

void* operator new(std::size_t bytes) {
  void* memory = allocate(bytes, __builtin_return_address(0));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return allocate(bytes, __builtin_return_address(0));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

extern "C" void* aligned_alloc(std::size_t alignment, std::size_t bytes) {
  static auto* const real = next<void*(std::size_t, std::size_t)>("aligned_alloc");
  if (armed && ours(__builtin_return_address(0)) && fails()) return nullptr;
  return real(alignment, bytes);
}

extern "C" int posix_memalign(void** memory, std::size_t alignment, std::size_t bytes) {
  static auto* const real = next<int(void**, std::size_t, std::size_t)>("posix_memalign");
  if (armed && fails()) return ENOMEM;
  return real(memory, alignment, bytes);
}
