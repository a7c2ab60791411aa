// score_rule_bias.cu — adds up the gradient of relative_bias over the slices that attention_bwd_dq has
// written, and over heads where they share it.
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
    const int heads = params.problem.heads, bias_head = static_cast<int>(index / width);
    const int first = rule.bias_heads == 1 ? 0 : bias_head,
              end = rule.bias_heads == 1 ? heads : bias_head + 1;
    for (int slice = 0; slice < rule.slices; ++slice) {
      for (int head = first; head < end; ++head) {
        sum += rule.bias_sums[(static_cast<int64_t>(slice) * heads + head) * sum_width + at];
      }
    }
  }
  params.drelative_bias[index] = static_cast<float>(sum * rule.kept_times);
}

}  // namespace spattn
