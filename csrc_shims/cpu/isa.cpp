#if defined(TORCH_PAGED_X86)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace torch_paged {

namespace {

#if defined(TORCH_PAGED_X86)
bool has_f16c() {  // clang's __builtin_cpu_supports does not know it
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

bool has_avx2() {
#if defined(TORCH_PAGED_X86)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(TORCH_PAGED_X86)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vbmi");
#else
  return false;
#endif
}

const KernelTable& choose() {
  const char* asked = std::getenv("TORCH_PAGED_CPU_ISA");
  const bool any = asked == nullptr || *asked == '\0';
#if defined(TORCH_PAGED_X86)
  if (has_avx512() && (any || std::strcmp(asked, "avx512") == 0)) return avx512_kernels();
  if (has_avx2() && (any || std::strcmp(asked, "avx2") == 0)) return avx2_kernels();
#endif
  if (any || std::strcmp(asked, "generic") == 0) return generic_kernels();
  throw std::invalid_argument("torch_paged: TORCH_PAGED_CPU_ISA must name kernels that this machine runs (" +
                              std::string(has_avx512() ? "avx512, avx2, "
                                          : has_avx2() ? "avx2, "
                                                       : "") +
                              "generic), got '" + asked + "'");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

const char* isa_name() { return kernels().name; }

}  // namespace torch_paged
