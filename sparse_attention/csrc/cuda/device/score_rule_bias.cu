// score_rule_bias.cu — adds up the gradient of relative_bias over the slices that attention_bwd_dq or
// attention_bwd_sm90 has written, and over heads where they share it.
//
// Mapping: a thread for each element.
// Numerics: float64 sums, in a fixed order; rounded once.
#include "cuda/device/score_rule.cuh"

namespace spattn {

constexpr int kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads)
    score_rule_bias(const __grid_constant__ SpattnCudaRuleBiasParams params) {
  const SpattnCudaRule& rule = params.rule;
  const int64_t width = 2 * static_cast<int64_t>(rule.bias_reach) - 1,
                sum_width = 2 * static_cast<int64_t>(rule.sum_reach) - 1;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= rule.bias_heads * width) return;
  const int64_t at = index % width - rule.bias_reach + rule.sum_reach;
  double sum = 0;
  if (at >= 0 && at < sum_width) {
    // Of all heads of all slices, or of one in each.
    const int heads = params.problem.heads, step = rule.bias_heads == 1 ? 1 : heads;
    const int64_t end = static_cast<int64_t>(rule.slices) * heads;
#pragma unroll 8
    for (int64_t i = index / width; i < end; i += step) sum += rule.bias_sums[i * sum_width + at];
  }
  params.drelative_bias[index] = static_cast<float>(sum * rule.kept_times);
}

}  // namespace spattn
