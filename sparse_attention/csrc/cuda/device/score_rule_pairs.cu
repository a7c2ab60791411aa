// score_rule_pairs.cu — what a mask of pairs allows between each block of queries and each of keys, in any
// head: of most blocks nothing or all, and then nobody else reads their part of the mask.
//
// Mapping: a warp for each (batch, q block, kv block); a batch of 1 where all sequences have one mask.
//          32 pairs at a time, neighbouring keys in neighbouring lanes; where the mask is aligned and all
//          keys of the block exist, 512.
// Cost:    reads the mask once, as many bytes as it has pairs; writes a byte for each pair of blocks.
// Numerics: none. Rows that do not exist neither allow nor forbid.
#include "cuda/device/segments.cuh"

namespace spattn {

constexpr int kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads)
    score_rule_pairs(const __grid_constant__ SpattnCudaRulePairsParams params) {
  const SpattnProblem& problem = params.problem;
  const SpattnCudaRule& rule = params.rule;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int64_t pairs = static_cast<int64_t>(params.q_blocks) * params.kv_blocks;
  if (index >= params.batch * pairs) return;
  const int batch = static_cast<int>(index / pairs);
  const int q_block = static_cast<int>(index % pairs / params.kv_blocks),
            kv_block = static_cast<int>(index % params.kv_blocks);
  const Sides sides = Sides::Make(rule, problem, batch);
  const int heads = rule.mask_strides[1] == 0 ? 1 : problem.heads, size = params.block_size;
  int kinds = 0;
  const bool reads_vectors = !SPATTN_ROW_STRIDED && rule.mask_is_aligned && size % 16 == 0 &&
                             sides.kv_rows.AllExist(kv_block * size, size);
#pragma unroll 2
  for (int i = threadIdx.x % 32; reads_vectors && i < size * size / 16; i += 32) {
    const int q_row = sides.q_rows.Row(q_block * size + i * 16 / size);
    if (q_row < 0) continue;
    const uint8_t* at = rule.mask + batch * rule.mask_strides[0] + q_row * rule.mask_strides[2] +
                        kv_block * size + i * 16 % size;
    for (int head = 0; head < heads; ++head) {
      const uint4 keys = __ldg(reinterpret_cast<const uint4*>(at + head * rule.mask_strides[1]));
      const uint32_t all =
          NonzeroBytes(keys.x) & NonzeroBytes(keys.y) & NonzeroBytes(keys.z) & NonzeroBytes(keys.w);
      if (keys.x | keys.y | keys.z | keys.w) kinds |= SPATTN_SOME_ALLOWED;
      if (all != 0x80808080u) kinds |= SPATTN_SOME_FORBIDDEN;
    }
  }
  for (int i = threadIdx.x % 32; !reads_vectors && i < size * size; i += 32) {
    const int q_row = sides.q_rows.Row(q_block * size + i / size),
              kv_row = sides.kv_rows.Row(kv_block * size + i % size);
    if (q_row < 0 || kv_row < 0) continue;
    const uint8_t* at = rule.mask + batch * rule.mask_strides[0] + q_row * rule.mask_strides[2] +
                        kv_row * rule.mask_strides[3];
    for (int head = 0; head < heads; ++head) {
      kinds |=
          __ldg(at + head * rule.mask_strides[1]) ? SPATTN_SOME_ALLOWED : SPATTN_SOME_FORBIDDEN;
    }
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) kinds |= __shfl_xor_sync(kFullWarp, kinds, lanes);
  if (threadIdx.x % 32 == 0) rule.pair_kinds[index] = static_cast<uint8_t>(kinds);
}

}  // namespace spattn
