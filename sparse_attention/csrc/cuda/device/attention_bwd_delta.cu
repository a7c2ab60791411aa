// attention_bwd_delta.cu — the two numbers of each query row that the other backward passes read.
//
// Math:    delta_i = <do_i, o_i> - dlse_i
//          lse_exp_i = lse_i * kExpScale, or +inf for an empty row, or NaN where do_i is not finite
//          With them p_ij = Exp(s_ij * kExpScale - lse_exp_i), which is 0 in an empty row, and
//          ds_ij = p_ij * (dp_ij - delta_i). NaN reaches all that row i may be paired with, and nothing
//          else: attention_bwd_dkv.cu takes what is not finite out of q and do where some pairs are not
//          allowed.
// Mapping: kLanes neighbouring lanes per (batch, row, head), heads fastest, as the tensors lie.
// Cost:    reads o, do, lse once; writes two floats per row.
// Numerics: f32 sums, in a fixed order.
#include "cuda/device/device.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDimV = SPATTN_HEAD_DIM_V, kThreads = 256;
constexpr int kChunks = kHeadDimV / kVector;
constexpr int kLanes = kChunks > 16 ? 32 : kChunks > 8 ? 16 : kChunks > 4 ? 8 : kChunks > 2 ? 4 : 2;

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_bwd_delta(const __grid_constant__ SpattnCudaBwdParams params) {
  const SpattnProblem& problem = params.problem;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const bool exists = index < problem.batch * problem.q_len * problem.heads;
  const int head = static_cast<int>(index % problem.heads);
  const int64_t sequence_row = index / problem.heads;
  const int batch = static_cast<int>(sequence_row / problem.q_len);
  const int row = static_cast<int>(sequence_row % problem.q_len);

  float sum = 0, zero = 0;  // NaN where do is not finite
  if (exists) {
    const T* o = RowSpan::Make(params.o, batch, head).Row(row);
    const T* dout = RowSpan::Make(params.dout, batch, head).Row(row);
    for (int chunk = threadIdx.x % kLanes; chunk < kChunks; chunk += kLanes) {
      const uint4 o_words = __ldg(reinterpret_cast<const uint4*>(o) + chunk);
      const uint4 dout_words = __ldg(reinterpret_cast<const uint4*>(dout) + chunk);
      const T* a = reinterpret_cast<const T*>(&o_words);
      const T* b = reinterpret_cast<const T*>(&dout_words);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        sum = fmaf(ToFloat(a[i]), ToFloat(b[i]), sum);
        zero = fmaf(ToFloat(b[i]), 0, zero);
      }
    }
  }
#pragma unroll
  for (int lanes = kLanes / 2; lanes > 0; lanes /= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, lanes);
    zero += __shfl_xor_sync(kFullWarp, zero, lanes);
  }
  if (exists && threadIdx.x % kLanes == 0) {
    const int64_t at = (static_cast<int64_t>(batch) * problem.heads + head) * problem.q_len + row;
    const float lse = params.lse[at];
    params.lse_exp[at] = lse == -kInf ? kInf : lse * kExpScale + zero;
    params.delta[at] = params.dlse ? sum - params.dlse[at] : sum;
  }
}

}  // namespace spattn
