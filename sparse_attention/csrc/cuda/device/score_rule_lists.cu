// score_rule_lists.cu — the lists of a plan without the blocks that segments or a mask keep from a tile,
// for each sequence: what packing n documents costs is about 1 / n, and a causal mask as much as a causal
// plan.
//
// Mapping: a warp for each (batch, plan head, tile); 32 entries of its list at a time.
// Cost:    reads lists, ranges and kinds, writes what is left, for each sequence.
// Numerics: the order of a list stays, so that sums do. Entries out of range are left out.
#include "cuda/device/segments.cuh"

namespace spattn {

constexpr int kThreads = 256;

extern "C" __global__ void __launch_bounds__(kThreads)
    score_rule_lists(const __grid_constant__ SpattnCudaRuleListsParams params) {
  const SpattnProblem& problem = params.problem;
  const SpattnTilePlan& plan = params.plan;
  const int64_t index = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  const int lists = plan.heads * plan.tiles, lane = threadIdx.x % 32;
  if (index >= problem.batch * lists) return;
  const int batch = static_cast<int>(index / lists), at = static_cast<int>(index % lists);
  const int tile = at % plan.tiles, plan_head = at / plan.tiles;
  const Sides sides = Sides::Make(params.rule, problem, batch);
  const int owned_blocks = params.tile / params.block_size;
  const int group = problem.heads / problem.kv_heads;
  const int32_t* owned =  // the blocks of a tile of keys
      plan.tile_blocks +
      (static_cast<int64_t>(plan_head / group) * plan.tiles + tile) * owned_blocks;
  // The block that is number i of those that the tile owns, or -1.
  const auto owned_block = [&](int i) {
    if (!params.is_by_kv) return tile * owned_blocks + i;
    const int block = __ldg(owned + i);
    const bool is_valid = block >= 0 && block <= sides.kv_rows.positions / params.block_size;
    return is_valid ? block : -1;
  };
  const SegmentRange own = sides.RangeOf(params.is_by_kv, params.tile, [&](int r) {
    const int block = owned_block(r / params.block_size);
    return block < 0 ? -1 : block * params.block_size + r % params.block_size;
  });
  // SpattnPairKinds of the tile and a passing block.
  const auto kinds_with = [&](int block) {
    const uint8_t* all_kinds = params.rule.pair_kinds;
    if (all_kinds == nullptr) return static_cast<int>(SPATTN_SOME_ALLOWED);
    const int64_t first_row =
        params.pairs_batch == 1 ? 0 : static_cast<int64_t>(batch) * params.q_blocks;
    int kinds = 0;
#pragma unroll 1  // or sm_90a spills
    for (int i = 0; i < owned_blocks; ++i) {
      const int q_block = params.is_by_kv ? block : owned_block(i),
                kv_block = params.is_by_kv ? owned_block(i) : block;
      if (static_cast<unsigned>(q_block) >= static_cast<unsigned>(params.q_blocks) ||
          static_cast<unsigned>(kv_block) >= static_cast<unsigned>(params.kv_blocks)) {
        continue;
      }
      kinds |= __ldg(all_kinds + (first_row + q_block) * params.kv_blocks + kv_block);
    }
    return kinds;
  };
  const int32_t* ranges = (params.is_by_kv ? params.rule.q_ranges : params.rule.kv_ranges) +
                          2 * static_cast<int64_t>(batch) * plan.blocks;
  const int begin = Min(Max(__ldg(plan.indptr + at), 0), plan.entries),
            end = Min(__ldg(plan.indptr + at + 1), plan.entries);
  const int64_t sequence = static_cast<int64_t>(batch) * plan.entries;
  int left = begin;
  for (int entry = begin; entry < end; entry += 32) {
    const bool exists = entry + lane < end;
    const int block = exists ? __ldg(plan.indices + entry + lane) : -1;
    const int mask_id = exists ? __ldg(plan.mask_ids + entry + lane) : -1;
    bool is_left = static_cast<unsigned>(block) < static_cast<unsigned>(plan.blocks) &&
                   mask_id >= -1 && mask_id < plan.mask_blocks;
    SegmentRange range{0, -1};
    if (is_left) range = {__ldg(ranges + 2 * block), __ldg(ranges + 2 * block + 1)};
    is_left = is_left && own.Meets(range);
    const int kinds = is_left ? kinds_with(block) : 0;
    is_left = kinds & SPATTN_SOME_ALLOWED;
    const uint32_t all_left = __ballot_sync(kFullWarp, is_left);
    if (is_left) {
      const int64_t to = sequence + left + __popc(all_left & ((1u << lane) - 1));
      const bool is_checked = !own.IsOne() || !range.IsOne() || (kinds & SPATTN_SOME_FORBIDDEN);
      params.indices[to] = block;
      params.mask_ids[to] = (mask_id + 1) | (is_checked ? kCheckPairs : 0);
    }
    left += __popc(all_left);
  }
  if (lane == 0) params.ends[static_cast<int64_t>(batch) * lists + at] = left;
}

}  // namespace spattn
