// flash_attn_varlen, with and without statistics: keys from the cache, beside it, or both.
#include "attention.h"

using namespace torch_paged::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return one_execution(data, size, [](Input& in) { run_attention(in, true); });
}
