// array.h — the shape and the data of a tensor, as TensorFlow's and XLA's bindings both read them.
//
// Shapes come from graphs that anybody may have written, and TensorShape ends the process where sizes
// multiply to more than 2^63. So shapes are compared here, as numbers, and none is built from sizes
// that CheckElements has not seen.
#ifndef SPARSE_ATTENTION_TF_ARRAY_H_
#define SPARSE_ATTENTION_TF_ARRAY_H_

#include <initializer_list>
#include <string>

#include "abi/core.h"
#include "abi/status.h"

namespace spattn {

// An array in row-major order.
struct Array {
  static constexpr int kMostDims = 5;  // of what any op takes
  void* data;                          // null while XLA compiles a graph
  int64_t rank;                        // of an array with more dims than that, the first are kept
  int64_t dims[kMostDims];

  template <class Dims>
  Array(void* data, int64_t rank, const Dims& dims_of) : data(data), rank(rank), dims{} {
    for (int i = 0; i < kMostDims && i < rank; ++i) dims[i] = dims_of(i);
  }
  Array() : Array(nullptr, 0, [](int) { return 0; }) {}

  int64_t dim(int i) const { return i < rank ? dims[i] : 0; }
  const int32_t* ints() const { return static_cast<const int32_t*>(data); }
  const uint8_t* bytes() const { return static_cast<const uint8_t*>(data); }
};

inline std::string ShapeOf(const int64_t* dims, int64_t rank) {
  std::string shape = "[";
  for (int64_t i = 0; i < rank && i < Array::kMostDims; ++i) {
    shape += (i ? "," : "") + std::to_string(dims[i]);
  }
  return shape + (rank > Array::kMostDims ? ",...]" : "]");
}

inline std::string ShapeOf(const Array& array) { return ShapeOf(array.dims, array.rank); }

// Whether a tensor with these sizes can exist, and its bytes be counted, even if one size is 0. Sizes
// below 0 are unknown.
inline SpattnStatus CheckElements(const char* name, const int64_t* dims, int64_t rank) {
  constexpr int64_t kMost = int64_t{1} << 60;
  int64_t elements = 1;
  for (int64_t i = 0; i < rank; ++i) {
    SPATTN_RETURN_IF(dims[i] > 0 && elements > kMost / dims[i],
                     "the sizes of %s must multiply to at most 2^60, got %s", name,
                     ShapeOf(dims, rank).c_str());
    elements *= dims[i] > 0 ? dims[i] : 1;
  }
  return Ok();
}

inline SpattnStatus CheckElements(const char* name, std::initializer_list<int64_t> dims) {
  return CheckElements(name, dims.begin(), static_cast<int64_t>(dims.size()));
}

inline SpattnStatus CheckArray(const char* name, const Array& array,
                               std::initializer_list<int64_t> expected) {
  const int64_t rank = static_cast<int64_t>(expected.size());
  bool is_equal = array.rank == rank;
  for (int i = 0; is_equal && i < rank; ++i) is_equal = array.dims[i] == expected.begin()[i];
  SPATTN_RETURN_IF(!is_equal, "%s must have shape %s, got %s", name,
                   ShapeOf(expected.begin(), rank).c_str(), ShapeOf(array).c_str());
  return Ok();
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_ARRAY_H_
