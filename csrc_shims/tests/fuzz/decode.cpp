// paged_attention, with and without statistics.
#include "attention.h"

using namespace torch_paged::fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  return one_execution(data, size, [](Input& in) { run_attention(in, false); });
}
