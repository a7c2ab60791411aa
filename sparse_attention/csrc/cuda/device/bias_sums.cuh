// bias_sums.cuh — adds up the gradient of relative_bias: ds_ij goes to the distance i - j.
//
// A CTA puts the ds of a sub-tile into shared memory; thread t adds up the pairs whose positions are a
// diagonal, and adds the sum to its distance in the CTA's strip of device memory. No two threads may
// have one distance at a time. Neighbouring positions are neighbouring rows, or with a row_stride s
// rows s apart, as long as they are of one residue; so no two diagonals of a residue of queries and a
// residue of keys have one distance, and these pairs of residues are taken in turn. Distances beyond
// the reach are all one; each thread keeps its own pairs of them until the end, and where a sub-tile has
// no others, that is all. All is added in a fixed order.
#pragma once
#include "cuda/device/score_rule.cuh"

namespace spattn {

#ifndef SPATTN_BIAS_SUMS
#define SPATTN_BIAS_SUMS 0
#endif
constexpr bool kSumsBias = SPATTN_BIAS_SUMS;

// kRun neighbouring columns of a sub-tile are neighbouring positions.
template <int kRows, int kColumns, int kTileRun>
struct BiasSums {
  static constexpr int kRun = Min(kTileRun, kColumns);
  static constexpr int kPitch = kColumns + 1;  // odd: a diagonal step goes through all banks
  static constexpr int kRuns = kColumns / kRun;
  static constexpr int kBytes = kSumsBias ? RoundUp(kRows * kPitch * 4, 16) + 64 : 0;
  static_assert(kRuns <= 16, "their first positions");

  float* tile;      // [kRows, kPitch], shared
  int* first_keys;  // [kRuns] positions, shared: all threads see the same, whoever writes to a plan
  float* strip;     // [2 * sum_reach - 1], device memory
  float beyond[2];  // of this thread: distances beyond the reach, below and above
  int last, zero;   // of the strip; where distance 0 is
  bool is_in_reach;  // whether this thread has put a pair that is
  bool has_put;      // whether this warp has written its rows of the tile

  template <int kThreads>
  __forceinline__ void Init(unsigned char* smem, const SpattnCudaRule& rule, int heads, int head) {
    const int64_t width = 2 * static_cast<int64_t>(rule.sum_reach) - 1;
    tile = reinterpret_cast<float*>(smem);
    first_keys = reinterpret_cast<int*>(smem + kBytes - 64);
    strip = rule.bias_sums + (static_cast<int64_t>(blockIdx.x) * heads + head) * width;
    for (int i = threadIdx.x; i < width; i += kThreads) strip[i] = 0;
    beyond[0] = beyond[1] = 0;
    last = 2 * rule.sum_reach - 2, zero = rule.sum_reach - 1;
    __syncthreads();
  }

  // Begins a sub-tile.
  template <FragmentCase kCase>
  __forceinline__ void Begin(Case<kCase>) {
    has_put = kCase != kBeyondReach;
    is_in_reach = kCase == kWithinReach;
  }

  // ds of a pair whose rows are `distance` apart, q_offset included.
  template <int kWarpRows, FragmentCase kCase>
  __forceinline__ void Put(Case<kCase>, float ds, int distance, int m, int h, int n, int j) {
    const int at = distance + zero;
    const bool is_below = kCase != kWithinReach && at <= 0;
    const bool is_above = kCase != kWithinReach && at >= last && !is_below;
    if (is_below) beyond[0] += ds;
    if (is_above) beyond[1] += ds;
    if (kCase == kBeyondReach) return;
    const bool is_inside = !is_below && !is_above;
    is_in_reach |= is_inside;
    const int row = threadIdx.x / 32 * kWarpRows + m * 16 + h * 8 + threadIdx.x % 32 / 4;
    tile[row * kPitch + n * 8 + threadIdx.x % 4 * 2 + j] = is_inside ? ds : 0;
  }

  // Adds a sub-tile that all warps have put: queries from a position on, and of each run of keys
  // position_of(column), -1: none.
  template <int kThreads, int kWarpRows, typename PositionOf>
  __forceinline__ void Add(const RowMap& q_rows, int first_query, int q_offset,
                           const RowMap& kv_rows, PositionOf position_of) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const int first_key = position_of(run * kRun);  // whole warps
      if (threadIdx.x == 0) first_keys[run] = first_key;
    }
    if (!__syncthreads_or(is_in_reach)) return;
    float* own_rows = tile + threadIdx.x / 32 * kWarpRows * kPitch;
    for (int i = threadIdx.x % 32; !has_put && i < kWarpRows * kPitch; i += 32) own_rows[i] = 0;
    __syncthreads();
    const int last_query = Min(first_query + kRows, q_rows.positions) - 1;
#pragma unroll 1
    for (int run = 0; run < kRuns; ++run) {
      const int first_key = first_keys[run];
      const int last_key = Min(first_key + kRun, kv_rows.positions) - 1;
      if (first_key < 0 || last_key < first_key) continue;
#pragma unroll 1
      for (int a = q_rows.Residue(first_query); a <= q_rows.Residue(last_query); ++a) {
#pragma unroll 1
        for (int b = kv_rows.Residue(first_key); b <= kv_rows.Residue(last_key); ++b) {
          // Of the sub-tile, what is in both residues.
          const int first_row = Max(a * q_rows.chunk - first_query, 0);
          const int end_row = Min((a + 1) * q_rows.chunk, last_query + 1) - first_query;
          const int first_column = Max(b * kv_rows.chunk - first_key, 0);
          const int end_column = Min((b + 1) * kv_rows.chunk, last_key + 1) - first_key;
          for (int t = threadIdx.x; t < kRows + kRun - 1; t += kThreads) {
            const int ahead = t - (kRun - 1);  // of row and column
            const int begin = Max(first_column, first_row - ahead),
                      end = Min(end_column, end_row - ahead);
            if (begin >= end) continue;
            float sums[2] = {0, 0};  // two chains: half the latency
            const float* from = tile + ahead * kPitch + run * kRun;
            int column = begin;
#pragma unroll 4
            for (; column + 1 < end; column += 2) {
              sums[0] += from[column * (kPitch + 1)];
              sums[1] += from[(column + 1) * (kPitch + 1)];
            }
            if (column < end) sums[0] += from[column * (kPitch + 1)];
            const int at = q_rows.ExistingRow(first_query + ahead + begin) -
                           kv_rows.ExistingRow(first_key + begin) + q_offset + zero;
            if (at > 0 && at < last) strip[at] += sums[0] + sums[1];
          }
          __syncthreads();  // the next pair may have the same distances
        }
      }
    }
    __syncthreads();
  }

  template <int kThreads>
  __forceinline__ void Finish() {
    tile[threadIdx.x] = beyond[0], tile[kThreads + threadIdx.x] = beyond[1];
    __syncthreads();
    if (threadIdx.x != 0) return;
    float below = 0, above = 0;
    for (int i = 0; i < kThreads; ++i) below += tile[i], above += tile[kThreads + i];
    strip[0] += below;
    strip[last] += above;
  }
};

}  // namespace spattn
