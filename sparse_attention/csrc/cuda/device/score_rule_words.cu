// score_rule_words.cu — dropout's random words of each row (abi/score_rule.h), for the kernels that
// join two of them.
//
// Mapping: a thread for each (batch, head, row), of queries first, then of keys.
// Cost:    11 to 20 Philox rounds a row; writes 8 bytes for a query, 4 for a key.
#include "cuda/device/score_rule.cuh"

namespace spattn {

constexpr int kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads)
    score_rule_words(const __grid_constant__ SpattnCudaRuleWordsParams params) {
  const SpattnProblem& problem = params.problem;
  const SpattnCudaRule& rule = params.rule;
  const int64_t rows = int64_t{rule.query_pitch} + rule.key_pitch;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= problem.batch * problem.heads * rows) return;
  const int64_t head_at = index / rows;
  const int row = static_cast<int>(index % rows);
  const PhiloxWords key =
      DropoutKey(params.dropout_seed, head_at / problem.heads, head_at % problem.heads);
  if (row < rule.query_pitch) {
    const DropoutQuery query = DropoutOfQuery(key, row + rule.q_offset);
    uint32_t* to = rule.query_words + (head_at * rule.query_pitch + row) * 2;
    to[0] = query.multiplier, to[1] = query.addend;
  } else {
    const int key_row = row - rule.query_pitch;
    rule.key_words[head_at * rule.key_pitch + key_row] = DropoutOfKey(key, key_row);
  }
}

}  // namespace spattn
