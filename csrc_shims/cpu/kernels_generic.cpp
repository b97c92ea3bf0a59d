#include "row_kernel.h"

namespace torch_paged {

const KernelTable& generic_kernels() {
  static constexpr KernelTable table = make_table("generic");
  return table;
}

}  // namespace torch_paged
