// attention_bwd_finish.cu — dq from what attention_bwd_sm90 has added up.
//
// Math:    dq_i = T(softmax_scale * sum_i), 0 where no kv tile lists the run of query i;
//          with dropout the host has multiplied softmax_scale by kept_times
// Mapping: a thread has 16 columns of one query, of the last piece 8 or 16: 64 contiguous bytes of a unit of
//          8 queries, which lie as the lanes of a warp had them (StoreDq in attention_bwd_sm90.cu).
//          Columns fastest.
// Cost:    reads 4 bytes and writes 2 per element of dq.
#include "cuda/device/device.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM, kThreads = 256;
constexpr int kPieces = CeilDiv(kHeadDim, 16);  // of 16 columns of 8 queries
static_assert(kHeadDim % 8 == 0 && sizeof(T) == 2, "a piece has 16 columns, the last one 8 or 16");

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_bwd_finish(const __grid_constant__ SpattnCudaMappedBwdParams mapped) {
  const SpattnProblem& problem = mapped.call.problem;
  const SpattnCudaDqSums& sums = mapped.sums;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int piece = static_cast<int>(index % kPieces);
  const int64_t rows = index / kPieces, sequence_head = rows / problem.q_len;
  if (sequence_head >= problem.batch * problem.heads) return;
  const int row = static_cast<int>(rows % problem.q_len);
  const int head = static_cast<int>(sequence_head % problem.heads),
            batch = static_cast<int>(sequence_head / problem.heads);

  uint4 packed[2] = {};
  if (__ldg(sums.additions + sequence_head * sums.runs + row / sums.run_rows) > 0) {
    const int64_t unit = sequence_head * sums.runs * (sums.run_rows / 8) + row / 8;
    const float4* from = reinterpret_cast<const float4*>(
        sums.dq + (unit * kPieces + piece) * (8 * 16) + row % 8 * 16);
    uint32_t words[8];
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // columns 2 i, 2 i + 1 and those 8 on
      const float4 four = __ldg(from + i);
      words[i] = PackPair(four.x * problem.softmax_scale, four.y * problem.softmax_scale);
      words[4 + i] = PackPair(four.z * problem.softmax_scale, four.w * problem.softmax_scale);
    }
    packed[0] = {words[0], words[1], words[2], words[3]};
    packed[1] = {words[4], words[5], words[6], words[7]};
  }
  uint4* to =
      reinterpret_cast<uint4*>(RowSpan::Make(mapped.call.dq, batch, head).Row(row) + piece * 16);
  to[0] = packed[0];
  if (kHeadDim % 16 == 0 || piece < kPieces - 1) to[1] = packed[1];
}

}  // namespace spattn
