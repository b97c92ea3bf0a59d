#include "dense.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "parallel.h"

namespace torch_paged {

namespace {

template <class T>
void copy_row(const char* from, int64_t stride, char* to, int64_t count) {
  const T* source = reinterpret_cast<const T*>(from);
  T* target = reinterpret_cast<T*>(to);
  for (int64_t i = 0; i < count; ++i) target[i] = source[i * stride];
}

}  // namespace

void copy_dense(int64_t rank, const int64_t* sizes, const int64_t* strides, int64_t element_bytes, const void* from,
                void* to) {
  constexpr int64_t kBytesAtOnce = 16 * 1024;
  const int64_t last = rank - 1, count = sizes[last], stride = strides[last], row_bytes = count * element_bytes;
  const auto copy_last = element_bytes == 1   ? copy_row<uint8_t>
                         : element_bytes == 2 ? copy_row<uint16_t>
                         : element_bytes == 4 ? copy_row<uint32_t>
                                              : copy_row<uint64_t>;
  int64_t rows = 1;
  for (int64_t d = 0; d < last; ++d) rows *= sizes[d];
  const int64_t rows_at_once = std::max<int64_t>(1, kBytesAtOnce / row_bytes);
  const int64_t pieces = (rows + rows_at_once - 1) / rows_at_once;
  parallel_for(pieces, threads_for(rows * row_bytes), [&](int64_t piece) {
    const int64_t begin = piece * rows_at_once, end = std::min(rows, begin + rows_at_once);
    std::array<int64_t, 8> index{};
    int64_t place = 0;
    for (int64_t d = last - 1, left = begin; d >= 0; left /= sizes[d], --d) {
      index[d] = left % sizes[d];
      place += index[d] * strides[d];
    }
    char* row = static_cast<char*>(to) + begin * row_bytes;
    for (int64_t i = begin; i < end; ++i, row += row_bytes) {
      const char* source = static_cast<const char*>(from) + place * element_bytes;
      if (stride == 1)
        std::memcpy(row, source, row_bytes);
      else
        copy_last(source, stride, row, count);
      for (int64_t d = last - 1; d >= 0; --d) {
        place += strides[d];
        if (++index[d] < sizes[d]) break;
        place -= sizes[d] * strides[d];
        index[d] = 0;
      }
    }
  });
}

}  // namespace torch_paged
