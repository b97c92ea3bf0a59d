#include "row_kernel.h"

namespace torch_paged {

const KernelTable& avx512_kernels() {
  static constexpr KernelTable table = make_table("avx512");
  return table;
}

}  // namespace torch_paged
