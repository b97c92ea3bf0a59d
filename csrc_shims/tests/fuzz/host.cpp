#include "host.h"

#include <omp.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <unordered_map>
#if !__has_feature(address_sanitizer)
#include <sys/mman.h>
#endif

using torch_paged::fuzz::HostTensor;
using torch_paged::fuzz::TypeCode;

namespace {

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

std::unordered_map<std::string, Kernel>& ops() {
  static std::unordered_map<std::string, Kernel> table;
  return table;
}

int threads_now = 1;
constexpr int64_t kMostBytes = 1 << 24;  // of a tensor

HostTensor* host(AtenTensorHandle handle) { return reinterpret_cast<HostTensor*>(handle); }

}  // namespace

int omp_in_parallel() { return 0; }
int omp_get_max_threads() { return threads_now; }
int omp_get_thread_num() { return 0; }
int omp_get_num_threads() { return 1; }

#define TYPE(NAME, CODE) \
  int32_t aoti_torch_dtype_##NAME() { return CODE; }
TYPE(float32, TypeCode::kF32)
TYPE(bfloat16, TypeCode::kBF16)
TYPE(float16, TypeCode::kF16)
TYPE(int8, TypeCode::kI8)
TYPE(float8_e4m3fn, TypeCode::kE4M3)
TYPE(float8_e5m2, TypeCode::kE5M2)
TYPE(int64, TypeCode::kI64)
TYPE(int32, TypeCode::kI32)
TYPE(bool, TypeCode::kBool)
TYPE(float64, TypeCode::kF64)
TYPE(uint8, 64)
TYPE(uint16, 65)
TYPE(uint32, 66)
TYPE(uint64, 67)
TYPE(int16, 68)
TYPE(complex32, 69)
TYPE(complex64, 70)
TYPE(complex128, 71)
TYPE(float8_e4m3fnuz, 72)
TYPE(float8_e5m2fnuz, 73)
#undef TYPE

int32_t aoti_torch_device_type_cpu() { return 0; }
int32_t aoti_torch_device_type_cuda() { return 1; }
int32_t aoti_torch_device_type_meta() { return 2; }
int32_t aoti_torch_device_type_xpu() { return 3; }

AOTITorchError aoti_torch_is_defined(AtenTensorHandle, bool* defined) {
  *defined = true;
  return 0;
}
AOTITorchError aoti_torch_get_dim(AtenTensorHandle t, int64_t* dim) {
  *dim = host(t)->rank;
  return 0;
}
AOTITorchError aoti_torch_get_sizes(AtenTensorHandle t, int64_t** sizes) {
  *sizes = host(t)->sizes.data();
  return 0;
}
AOTITorchError aoti_torch_get_strides(AtenTensorHandle t, int64_t** strides) {
  *strides = host(t)->strides.data();
  return 0;
}
AOTITorchError aoti_torch_get_dtype(AtenTensorHandle t, int32_t* type) {
  *type = host(t)->type;
  return 0;
}
AOTITorchError aoti_torch_get_device_type(AtenTensorHandle t, int32_t* device) {
  *device = host(t)->on_cpu ? aoti_torch_device_type_cpu() : aoti_torch_device_type_meta();
  return 0;
}
AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle t, void** data) {
  *data = host(t)->data();
  return 0;
}
AOTITorchError aoti_torch_empty_strided(int64_t rank, const int64_t* sizes, const int64_t* strides, int32_t type,
                                        int32_t, int32_t, AtenTensorHandle* result) {
  auto t = std::make_unique<HostTensor>();
  t->rank = rank;
  t->type = type;
  std::copy_n(sizes, rank, t->sizes.begin());
  std::copy_n(strides, rank, t->strides.begin());
  if (!t->allocate()) return 1;
  *result = reinterpret_cast<AtenTensorHandle>(t.release());
  return 0;
}
AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle t) {
  delete host(t);
  return 0;
}
AOTITorchError aoti_torch_library_init_impl(const char*, const char*, const char*, uint32_t, TorchLibraryHandle*) {
  return 0;
}
AOTITorchError aoti_torch_library_init_def(const char*, const char*, uint32_t, TorchLibraryHandle*) { return 1; }
AOTITorchError aoti_torch_library_init_fragment(const char*, const char*, uint32_t, TorchLibraryHandle*) { return 1; }
AOTITorchError aoti_torch_library_impl(TorchLibraryHandle, const char* name, Kernel kernel) {
  ops()[name] = kernel;
  return 0;
}
AOTITorchError aoti_torch_delete_library_object(TorchLibraryHandle) { return 0; }

namespace torch_paged::fuzz {

namespace {

#if __has_feature(address_sanitizer)
std::shared_ptr<char> exactly(int64_t bytes) { return {static_cast<char*>(std::malloc(bytes)), std::free}; }
#else
// Kernels without instrumentation: memory that ends where a page begins that nobody may touch.
std::shared_ptr<char> exactly(int64_t bytes) {
  constexpr int64_t kPage = 4096;
  static std::vector<char*> free_ends;
  if (free_ends.empty()) {
    void* begin =
        mmap(nullptr, kMostBytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (begin == MAP_FAILED) throw std::bad_alloc();
    free_ends.push_back(static_cast<char*>(begin) + kMostBytes);
    mprotect(free_ends.back(), kPage, PROT_NONE);
  }
  char* end = free_ends.back();
  free_ends.pop_back();
  return {end - bytes, [end](char*) { free_ends.push_back(end); }};
}
#endif

}  // namespace

bool HostTensor::allocate() {
  reach = 1;
  for (int64_t d = 0; d < rank; ++d) {
    if (sizes[d] == 0) {
      reach = 0;
      return true;
    }
    int64_t step = 0;
    if (__builtin_mul_overflow(sizes[d] - 1, strides[d], &step) || step > kMostBytes) return false;
    reach += step;
    if (reach > kMostBytes) return false;
  }
  const int64_t bytes = (offset + reach) * bytes_of(type);
  if (bytes > kMostBytes) return false;
  memory = exactly(bytes);
  std::memset(memory.get(), 0xff, bytes);
  return true;
}

void Call::tensor(const HostTensor& t) { put(new HostTensor(t)); }

void Call::optional_tensor(const HostTensor& t) {
  std::optional<HostTensor*> given;
  if (t.defined()) given = new HostTensor(t);
  put_optional(given);
}

std::vector<HostTensor> Call::run(const char* op, int results, int threads) {
  const Kernel kernel = ops().at(op);
  const size_t arguments = stack_.size();
  if (results > static_cast<int>(arguments)) found("a call with fewer arguments than results");
  threads_now = threads;
  kernel(stack_.data(), arguments, results);
  std::vector<HostTensor> taken;
  for (int i = 0; i < results; ++i) {
    HostTensor* t;
    std::memcpy(&t, &stack_[i], sizeof(t));
    taken.push_back(std::move(*t));
    delete t;
  }
  return taken;
}

void found(const std::string& what) {
  std::fprintf(stderr, "found: %s\n", what.c_str());
  std::abort();
}

}  // namespace torch_paged::fuzz
