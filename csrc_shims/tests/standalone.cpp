// A program without Python: loads the op definitions and the kernels, and calls them through PyTorch's dispatcher.
// Usage: standalone libtorch_paged_schema.so _C.abi3.so
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdio>
#include <limits>
#include <vector>

namespace {

std::vector<c10::IValue> call(const char* op, std::vector<c10::IValue> stack) {
  c10::Dispatcher::singleton().findSchemaOrThrow(op, "").callBoxed(&stack);
  return stack;
}

}  // namespace

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i)
    if (dlopen(argv[i], RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      std::fprintf(stderr, "standalone: %s\n", dlerror());
      return 2;
    }
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  const c10::IValue none;
  // 4 blocks of 2 tokens; three tokens go to block 3 and block 0, everything else stays NaN.
  const at::Tensor kv_cache = at::full({2, 4, 1, 2, 8}, kNaN, at::kFloat);
  const at::Tensor key = at::zeros({3, 1, 8}, at::kFloat);
  const at::Tensor value = at::empty({3, 1, 8}, at::kFloat);
  value[0].fill_(1), value[1].fill_(1), value[2].fill_(4);
  call("paged::reshape_and_cache", {key, value, kv_cache, at::tensor({6, 7, 0}, at::kLong), none});

  const at::Tensor query = at::full({1, 2, 8}, 1, at::kFloat);
  const at::Tensor tables = at::tensor({3, 0}, at::kInt).view({1, 2}), lengths = at::tensor({3}, at::kInt);
  const std::vector<c10::IValue> results = call("paged::paged_attention", {query, kv_cache, tables, lengths, none, none,
                                                                           none, none, none, 0.0, none, none, none});
  // Equal logits: the mean of 1, 1 and 4.
  const at::Tensor out = results[0].toTensor();
  const double worst = out.sub(2).abs().max().item<double>();
  std::printf("paged_attention without Python: %zu result, largest error %g\n", results.size(), worst);
  return worst <= 8 * std::numeric_limits<float>::epsilon() ? 0 : 1;
}
