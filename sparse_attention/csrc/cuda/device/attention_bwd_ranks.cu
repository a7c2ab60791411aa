// attention_bwd_ranks.cu — the order in which attention_bwd_sm90 adds dq up.
//
// Math:    rank of entry e, block b in the list of kv tile t = the number of tiles that start before t and
//          whose lists have b. Tiles start in the order of their numbers, or in the reverse of it.
// Mapping: one CTA per head of the plan by keys, and per sequence where a rule has left lists of each
//          (score_rule_lists.cu). Its threads take the entries of one tile's list, then those of
//          the next one to start.
// Output:  a copy of the plan that no one else writes (SpattnCudaDqSums), each list where `copied` has
//          made room for it. So whatever the plan holds, and whoever writes to it meanwhile, no two
//          lists share an entry; an entry out of range is absent, as is a block's second one in a list;
//          and the ranks of a block's entries are 0, 1, 2, ..., one for each of the tiles that list it.
//          Lists that reach beyond the copy, which those of a plan do not, are empty.
// Cost:    a barrier and two operations in shared memory per tile of a head, one after the other.
// Numerics: integers. Of a block that is in a list twice, either entry may be the one that counts.
#include "cuda/device/score_rule.cuh"

namespace spattn {

// ---- config ----

constexpr int kThreads = 512, kPlanBlock = SPATTN_PLAN_BLOCK;
constexpr int kAhead = 4;                            // tiles whose entries are on their way
constexpr int kSharedBlocks = SPATTN_SHARED_BLOCKS;  // of which counts fit the CTA

// ---- device helpers ----

struct List {
  int begin, length;  // in the plan
  int to;             // in the copy
};

struct Entry {
  int block, mask_id;
};

struct Smem {
  int counts[2 * kSharedBlocks];
  List lists[kThreads + 2 * kAhead];  // of the next tiles to start; behind them, of none
};

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads)
    attention_bwd_ranks(const __grid_constant__ Given<SpattnCudaMappedBwdParams> given) {
  const SpattnCudaMappedBwdParams& mapped = CallOf(given);
  __shared__ Smem smem;
#if SPATTN_RULE  // one that leaves lists: they are of a sequence, and so is their copy
  SpattnTilePlan plan = mapped.call.by_kv;
  SpattnCudaDqSums sums = mapped.sums;
  const int64_t sequence = blockIdx.y, first_list = sequence * plan.heads * plan.tiles,
                first_entry = sequence * plan.entries;
  const auto end_of = [&](int at) { return __ldg(RuleOf(given).kv_tile_ends + first_list + at); };
  plan.indices += first_entry, plan.mask_ids += first_entry;
  sums.copied += sequence, sums.lists += 2 * first_list;
  sums.indices += first_entry, sums.mask_ids += first_entry, sums.ranks += first_entry;
  if (sums.listed != nullptr) sums.listed += sequence * plan.heads * 2 * plan.blocks;
#else
  const SpattnTilePlan& plan = mapped.call.by_kv;
  const SpattnCudaDqSums& sums = mapped.sums;
  const auto end_of = [&](int at) { return __ldg(plan.indptr + at + 1); };
#endif
  const int thread = threadIdx.x, head = blockIdx.x;
  const int blocks =
      Min(plan.blocks, CeilDiv(static_cast<int>(mapped.call.problem.q_len), kPlanBlock));

  // How many tiles have listed a block so far; and the last of them, plus one.
  int* counts = smem.counts;
  if (sums.listed != nullptr) {
    counts = sums.listed + static_cast<int64_t>(head) * 2 * plan.blocks;
  } else {
    for (int i = thread; i < 2 * blocks; i += kThreads) counts[i] = 0;
  }
  int* last_tiles = counts + blocks;

  // The tile that is the i-th to start.
  const auto tile_of = [&](int i) { return sums.starts_with_last ? plan.tiles - 1 - i : i; };
  const auto read = [&](const List& list, int i) {
    if (i >= list.length) return Entry{-1, -1};
    return Entry{__ldg(plan.indices + list.begin + i), __ldg(plan.mask_ids + list.begin + i)};
  };
  const auto rank_of = [&](const Entry& entry, int tile) {
    const int mask_id = MaskId::Of(entry.mask_id).id;
    const bool is_valid =
        entry.block >= 0 && entry.block < blocks && mask_id >= -1 && mask_id < plan.mask_blocks;
    if (!is_valid || atomicExch(last_tiles + entry.block, tile + 1) == tile + 1) return -1;
    return counts[entry.block]++;  // no other thread has it in this tile
  };

#pragma unroll 1
  for (int done = 0; done < plan.tiles; done += kThreads) {
    __syncthreads();
    const int tiles = Min(plan.tiles - done, kThreads);
    if (thread < tiles) {
      const int at = head * plan.tiles + tile_of(done + thread);
      const int begin = Min(Max(__ldg(plan.indptr + at), 0), plan.entries),
                end = Min(end_of(at), plan.entries);
      int length = Max(end - begin, 0);
      const uint64_t to = atomicAdd(reinterpret_cast<unsigned long long*>(sums.copied),
                                    static_cast<uint64_t>(length));
      if (to + length > static_cast<uint64_t>(plan.entries)) length = 0;
      const int first = length == 0 ? 0 : static_cast<int>(to);
      smem.lists[thread] = {begin, length, first};
      sums.lists[at * 2] = first;
      sums.lists[at * 2 + 1] = first + length;
    }
    if (thread < 2 * kAhead) smem.lists[tiles + thread] = {0, 0, 0};
    __syncthreads();
    Entry coming[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) coming[i] = read(smem.lists[i], thread);
#pragma unroll 1
    for (int first = 0; first < tiles; first += kAhead) {
#pragma unroll
      for (int ahead = 0; ahead < kAhead; ++ahead) {
        const int i = first + ahead, tile = tile_of(done + i);
        const List list = smem.lists[i];
        Entry entry = coming[ahead];
        coming[ahead] = read(smem.lists[i + kAhead], thread);
#pragma unroll 1
        for (int e = thread; e < list.length; e += kThreads) {
          if (e != thread) entry = read(list, e);
          const int rank = rank_of(entry, tile);
          sums.indices[list.to + e] = rank < 0 ? -1 : entry.block;
          sums.mask_ids[list.to + e] = entry.mask_id;
          sums.ranks[list.to + e] = rank;
        }
        __syncthreads();
      }
    }
  }
}

}  // namespace spattn
