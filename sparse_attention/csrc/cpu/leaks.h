// leaks.h — keeps NaN and Inf out of the sums of those who do not attend to them.
//
// A product over a PARTIAL tile multiplies every row by every weight, and a masked weight of 0 does not
// silence a NaN or an Inf: 0 * NaN = NaN. Rows that hold one (there are none in a healthy run) are
// taken out of the tile before the product, and added by hand afterwards, only where the mask allows.
#ifndef SPARSE_ATTENTION_CPU_LEAKS_H_
#define SPARSE_ATTENTION_CPU_LEAKS_H_

#include "cpu/tiles.h"

namespace spattn {
namespace SPATTN_ISA {

struct Leaks {
  int count = 0;
  int index[kTileQ > kTileKV ? kTileQ : kTileKV];  // rows of the tile that were taken out

  Leaks() = default;
  explicit Leaks(float* row) : row_(row) {}

  // Zeroes the rows of tile [rows, ld] that hold a NaN or an Inf, and remembers which.
  template <class Terms>
  void TakeOut(float* tile, int rows, int dim, int64_t ld) {
    count = 0;
    for (int i = 0; i < rows; ++i) {
      if (Terms::RowIsFinite(tile + i * ld, dim)) continue;
      Zero(tile + i * ld, dim / Terms::kTerms);
      index[count++] = i;
    }
  }

  // The row as the caller's tensor has it; valid until the next call.
  const float* Row(const SpattnTensor& t, const SpattnProblem& problem, int64_t b, int64_t head,
                   int64_t row, int dim) const {
    LoadRow(RowAddress(t, problem.dtype, b, head, row), problem.dtype, dim, row_);
    return row_;
  }

 private:
  float* row_ = nullptr;  // [widest dim]
};

// sum [dim, kPanel] += row[d] * weight(i) for the queries i that attend.
template <class Weight>
inline void AddToPanel(const float* row, int dim, const Weight& weight, uint32_t attends,
                       float* sum) {
  for (int i = 0; i < kPanel; ++i) {
    if (!(attends >> i & 1)) continue;
    for (int d = 0; d < dim; ++d) sum[d * kPanel + i] += row[d] * weight(i);
  }
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_LEAKS_H_
