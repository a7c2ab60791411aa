// segments.cuh — which segments a block has, and whether two blocks can meet.
#pragma once
#include "cuda/device/score_rule.cuh"

namespace spattn {

// The segments of some rows, those that do not exist left out.
struct SegmentRange {
  int first, last;  // first is -1 where a row is in no segment, last where all rows are in none

  __forceinline__ bool Meets(const SegmentRange& other) const {
    return Max(first, 0) <= other.last && Max(other.first, 0) <= last;
  }
  // Whether all rows are in one segment. Ranges that meet are then of the same.
  __forceinline__ bool IsOne() const { return first == last; }
};

// The rows of queries and keys of a sequence.
struct Sides {
  const SpattnCudaRule& rule;
  const SpattnProblem& problem;
  int batch;
  RowMap q_rows, kv_rows;

  DEVICE Sides Make(const SpattnCudaRule& rule, const SpattnProblem& problem, int batch) {
    return {rule, problem, batch, RowMap::Make(problem.q_len, problem.row_stride, problem.q_len),
            RowMap::Make(problem.kv_len, problem.row_stride,
                         problem.kv_lengths ? problem.kv_lengths[batch] : problem.kv_len)};
  }

  // Of `count` positions, by a whole warp. position_of(r): position r of them, -1: none.
  template <typename PositionOf>
  __forceinline__ SegmentRange RangeOf(bool are_keys, int count, PositionOf position_of) const {
    SegmentRange range{0x7fffffff, -1};
    for (int r = threadIdx.x % 32; r < count; r += 32) {
      const int position = position_of(r);
      const int row = (are_keys ? kv_rows : q_rows).Row(position);
      if (row < 0) continue;
      const int segment = Max(are_keys ? KeySegment(rule, problem, batch, row)
                                       : QuerySegment(rule, problem, batch, row),
                              -1);
      range.first = Min(range.first, segment), range.last = Max(range.last, segment);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      range.first = Min(range.first, __shfl_xor_sync(kFullWarp, range.first, lanes));
      range.last = Max(range.last, __shfl_xor_sync(kFullWarp, range.last, lanes));
    }
    return range;
  }
};

}  // namespace spattn
