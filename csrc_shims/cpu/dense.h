// Dense copies of strided arguments.
#pragma once

#include <cstdint>

namespace torch_paged {

// Copies elements of 1, 2, 4 or 8 bytes at these strides to dense memory, on threads of the library: torch's own copy
// would wait in a forked child for threads that only its parent has. Of rank 1 to 8, no size being 0.
void copy_dense(int64_t rank, const int64_t* sizes, const int64_t* strides, int64_t element_bytes, const void* from,
                void* to);

}  // namespace torch_paged
