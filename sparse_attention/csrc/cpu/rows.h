// rows.h — rows of any dtype to float32 and back.
#ifndef SPARSE_ATTENTION_CPU_ROWS_H_
#define SPARSE_ATTENTION_CPU_ROWS_H_

#include "abi/core.h"
#include "cpu/simd.h"

namespace spattn {
namespace SPATTN_ISA {

SPATTN_INLINE int64_t ElementBytes(int32_t dtype) { return dtype == SPATTN_FLOAT32 ? 4 : 2; }

SPATTN_INLINE const char* RowAddress(const SpattnTensor& t, int32_t dtype, int64_t b, int64_t head,
                                     int64_t row) {
  const int64_t element = b * t.batch_stride + row * t.row_stride + head * t.head_stride;
  return static_cast<const char*>(t.data) + element * ElementBytes(dtype);
}

template <Vec (*kConvert)(HalfVec)>
SPATTN_INLINE void WidenRow(const char* from, int dim, float* to) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) Store(to + d, kConvert(LoadAs<HalfVec>(from + 2 * d)));
  if (d < dim) {  // dim is a multiple of 8; AVX-512 has 16 lanes
    HalfVec tail{};
    memcpy(&tail, from + 2 * d, 2 * (dim - d));
    Vec wide = kConvert(tail);
    memcpy(to + d, &wide, 4 * (dim - d));
  }
}

template <HalfVec (*kConvert)(Vec)>
SPATTN_INLINE void NarrowRow(const float* from, int dim, char* to) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) StoreAs(to + 2 * d, kConvert(Load(from + d)));
  if (d < dim) {
    Vec tail{};
    memcpy(&tail, from + d, 4 * (dim - d));
    HalfVec narrow = kConvert(tail);
    memcpy(to + 2 * d, &narrow, 2 * (dim - d));
  }
}

SPATTN_INLINE void LoadRow(const char* from, int32_t dtype, int dim, float* to) {
  if (dtype == SPATTN_FLOAT32) {
    for (int d = 0; d < dim; d += kRowLanes) StoreAs(to + d, LoadAs<RowVec>(from + 4 * d));
  } else if (dtype == SPATTN_FLOAT16) {
    WidenRow<FromFloat16>(from, dim, to);
  } else {
    WidenRow<FromBfloat16>(from, dim, to);
  }
}

SPATTN_INLINE void StoreRow(const float* from, int32_t dtype, int dim, char* to) {
  if (dtype == SPATTN_FLOAT32) {
    for (int d = 0; d < dim; d += kRowLanes) StoreAs(to + 4 * d, LoadAs<RowVec>(from + d));
  } else if (dtype == SPATTN_FLOAT16) {
    NarrowRow<ToFloat16>(from, dim, to);
  } else {
    NarrowRow<ToBfloat16>(from, dim, to);
  }
}

// True if x - x is 0 for every element: no NaN, no Inf.
SPATTN_INLINE bool RowIsFinite(const float* row, int dim) {
  RowVec sum{};
  for (int d = 0; d < dim; d += kRowLanes) {
    const RowVec x = LoadAs<RowVec>(row + d);
    sum += x - x;
  }
  float total = 0.0f;
  for (int i = 0; i < kRowLanes; ++i) total += sum[i];
  return total == 0.0f;
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_ROWS_H_
