#include "row_kernel.h"

namespace torch_paged {

const KernelTable& avx2_kernels() {
  static constexpr KernelTable table = make_table("avx2");
  return table;
}

}  // namespace torch_paged
