// score_rule_ranges.cu — the first and the last segment in each block of keys and of queries.
//
// Mapping: a warp for each (batch, block), of keys first, then of queries.
// Cost:    reads the segments, and a mask of keys, once; writes 8 bytes for each block.
#include "cuda/device/segments.cuh"

namespace spattn {

constexpr int kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads)
    score_rule_ranges(const __grid_constant__ SpattnCudaRuleRangesParams params) {
  const SpattnProblem& problem = params.problem;
  const int blocks = params.kv_blocks + params.q_blocks;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (index >= problem.batch * blocks) return;
  const int batch = static_cast<int>(index / blocks), at = static_cast<int>(index % blocks);
  const bool is_key = at < params.kv_blocks;
  const int block = is_key ? at : at - params.kv_blocks;
  const Sides sides = Sides::Make(params.rule, problem, batch);
  const SegmentRange range = sides.RangeOf(is_key, params.block_size,
                                           [&](int r) { return block * params.block_size + r; });
  int32_t* to =
      is_key ? params.rule.kv_ranges + 2 * (batch * static_cast<int64_t>(params.kv_blocks) + block)
             : params.rule.q_ranges + 2 * (batch * static_cast<int64_t>(params.q_blocks) + block);
  if (threadIdx.x % 32 == 0) to[0] = range.first, to[1] = range.last;
}

}  // namespace spattn
