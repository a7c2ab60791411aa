// attention_fwd_sm90.cuh — sizes and work of attention_fwd_sm90.cu, which says what they are for.
#pragma once
#include "cuda/device/score_rule.cuh"
#include "cuda/device/softmax.cuh"
#include "cuda/device/warpgroup.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM, kHeadDimV = SPATTN_HEAD_DIM_V;
constexpr int kPlanQ = 128;              // queries of a plan tile
constexpr int kPlanKV = SPATTN_PLAN_KV;  // keys of a plan block
constexpr int kGroups = SPATTN_GROUPS;   // that multiply
constexpr int kStages = SPATTN_STAGES;
constexpr int kSlots = 2 * kStages;
static_assert(kSlots >= kStages + 2, "slots outlive what the multiplying groups read of them");
constexpr int kThreads = (kGroups + 1) * kGroupThreads, kMaskThreads = 3 * 32;
constexpr int kGroupRows = 64, kTileQ = kGroups * kGroupRows, kMaskWords = kTileQ / 32;
constexpr int kTileKV = 128;
constexpr int kLists = kGroups == 3 ? 2 : 1;  // plan tiles that a part's queries lie in
constexpr int kGather = kTileKV / kPlanKV;    // blocks in a tile
constexpr int kN = kTileKV / 8, kOut = PaddedDim(kHeadDimV) / 8;
// Whether ALiBi is all that changes scores; then it is done here (Alibi), not by PanelRule.
constexpr bool kAlibiAlone = kHasAlibi && !kHasSoftcap && !kHasBias;
// The same of the soft cap, and of the bias. Each may be part of the exponent, for most tiles (try_update).
constexpr bool kCapAlone = kHasSoftcap && !kHasAlibi && !kHasBias;
constexpr bool kBiasAlone = kHasBias && !kHasAlibi && !kHasSoftcap;
constexpr bool kJoinsRule = kAlibiAlone || kCapAlone || kBiasAlone;
// Whether a tile's mask may be one of keys, the same for all queries.
constexpr bool kMasksKeys = kHasSegments && !kHasMask;
static_assert(!kMasksKeys || kLists == 1, "one list says which keys there are");
constexpr int kCopyRegisters = kGroups == 3 ? 32 : 72, kMathRegisters = kGroups == 3 ? 160 : 216;
static_assert(kGroups == 2 || kGroups == 3, "a tile of the plan, or one and a half");
static_assert(kStages >= 2 && (kStages & (kStages - 1)) == 0, "a tile's stage is a remainder");
static_assert(kHasWgmma && kHeadDim % 8 == 0 && kHeadDimV % 8 == 0, "whole units of 16 bytes");
static_assert(SPATTN_SCALE_POSITIVE, "the largest score is the largest <q, k>");

using QTile = Tile<kGroupRows, kHeadDim>;
using KTile = Tile<kTileKV, kHeadDim>;
using VTile = Tile<kTileKV, kHeadDimV>;

template <int kTheValue>
struct Number {
  static constexpr int kValue = kTheValue;
};

// ---- work ----

// What a CTA computes at a time: kTileQ queries of a head of a sequence.
//
// Parts are numbered section by section. A section is as many heads as L2 holds the k and v of; in it
// the last queries of all heads come first, since they have the longest lists of a causal plan. CTA c
// of the first wave has parts c, c + wave_ctas, c + 2 wave_ctas, ...
struct Part {
  const SpattnCudaMappedFwdParams& mapped;
  const SpattnCudaFwdParams& params;  // mapped.call
  int index, head, kv_head, batch;    // queries from position index * kTileQ on

  DEVICE Part Make(const SpattnCudaMappedFwdParams& mapped, unsigned number) {
    const SpattnProblem& p = mapped.call.problem;
    const unsigned tiles = mapped.tiles, all_heads = p.batch * p.heads;
    const unsigned section = number / (mapped.section_heads * tiles);
    const unsigned within = number - section * mapped.section_heads * tiles;
    const unsigned first = section * mapped.section_heads;
    const unsigned heads = Min(mapped.section_heads, all_heads - first);
    const unsigned head = first + within % heads;
    const int heads_per_kv_head = p.heads / p.kv_heads;
    return {mapped,
            mapped.call,
            static_cast<int>(tiles - 1 - within / heads),
            static_cast<int>(head % p.heads),
            static_cast<int>(head % p.heads) / heads_per_kv_head,
            static_cast<int>(head / p.heads)};
  }

  __forceinline__ int FirstPlanTile() const { return index * kGroups * kGroupRows / kPlanQ; }
  // Rows of 32 queries that the first plan tile has before the part's.
  __forceinline__ int FirstMaskWord() const { return index * kMaskWords % (kPlanQ / 32); }
};

DEVICE int PartsOfCta(const SpattnCudaMappedFwdParams& mapped) {
  return static_cast<int>(blockIdx.x) < mapped.wave_ctas ? mapped.wave_parts : 1;
}
DEVICE Part PartOfCta(const SpattnCudaMappedFwdParams& mapped, int i) {
  const unsigned wave = mapped.wave_ctas, before = blockIdx.x < wave ? i : mapped.wave_parts - 1;
  return Part::Make(mapped, blockIdx.x + before * wave);
}

DEVICE RowMap KvRows(const Part& part) {
  const SpattnProblem& problem = part.params.problem;
  return RowMap::Make(problem.kv_len, problem.row_stride,
                      problem.kv_lengths ? problem.kv_lengths[part.batch] : problem.kv_len);
}

// ---- lists ----

// A mask row that is none: all pairs of the block are allowed, or none are.
constexpr int kFull = -1, kAbsent = -2;

// With ALiBi lists are read from their ends: the largest scores of a causal row come first then, and
// TryUpdate need not raise its shift tile by tile. Blocks count down, so that the least is the next.
constexpr bool kReadsFromEnd = kHasAlibi;
DEVICE unsigned InOrder(unsigned block) { return kReadsFromEnd ? 0x7fffffffu - block : block; }

// What a passing tile consists of: block g gives its keys [g * kPlanKV, (g + 1) * kPlanKV).
struct Gathered {
  int first[kGather];             // first position, or -1
  int mask_row[kLists][kGather];  // of mask_bits, for each plan tile of the part; kFull; kAbsent
  int is_checked[kLeavesLists ? kGather : 1];  // for segments and mask
  int is_masked, is_last;                      // is_masked: 0, or how
};
constexpr int kByPairs = 1, kByKeys = 2;

// The blocks that the part's plan tiles list, in order. It lies in shared memory; one warp uses it.
struct UnionList {
  int at[kLists], end[kLists];  // what is left of each list
  bool exists[kLists];          // whether the plan has the tile: its rows need no mask otherwise
  RowMap kv_rows;
  int kv_head, batch;
  int64_t first_entry;  // where the lists that the rule has left for the sequence begin

  __forceinline__ void Init(const Part& part, const SpattnCudaRule& rule) {
    const SpattnTilePlan& plan = part.params.by_q;
    const int plan_head = plan.heads == 1 ? 0 : part.head, first_tile = part.FirstPlanTile();
    const int i = threadIdx.x % 32;
    __syncwarp();  // no lane reads the last part's any more
    if (i == 0) kv_rows = KvRows(part), kv_head = part.kv_head, batch = part.batch;
    if (kLeavesLists && i == 0) first_entry = static_cast<int64_t>(part.batch) * plan.entries;
    if (i < kLists) {
      exists[i] = first_tile + i < plan.tiles;
      const int32_t* indptr = plan.indptr + plan_head * plan.tiles + first_tile + i;
      at[i] = exists[i] ? Min(Max(__ldg(indptr), 0), plan.entries) : 0;
      const int32_t* ends = indptr + 1;
      if (kLeavesLists) {
        ends = rule.q_tile_ends + static_cast<int64_t>(part.batch) * plan.heads * plan.tiles +
               plan_head * plan.tiles + first_tile + i;
      }
      end[i] = exists[i] ? Min(__ldg(ends), plan.entries) : 0;
    }
    __syncwarp();
  }

  // Takes the next kGather blocks from the lists. Where none is left there is no block: such a tile is
  // masked, and so is the only tile of a part whose lists are empty.
  // checks_keys: what is to be checked is the same for all queries.
  __forceinline__ void Take(Gathered* to, const SpattnTilePlan& plan, bool checks_keys) {
    constexpr unsigned kNone = 0xffffffffu;
    constexpr int kStep = kReadsFromEnd ? -1 : 1;
    const int lane = Opaque(threadIdx.x) % 32;
    unsigned block[kLists];  // lane i: the list's block i from here on
    int mask_id[kLists], taken[kLists] = {};
    const int64_t list_at = kLeavesLists ? first_entry : 0;
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const int from = kReadsFromEnd ? end[i] - 1 - lane : at[i] + lane;
      const bool is_there = kReadsFromEnd ? from >= at[i] : from < end[i];
      block[i] = is_there ? InOrder(__ldg(plan.indices + list_at + from)) : kNone;
      mask_id[i] = is_there ? __ldg(plan.mask_ids + list_at + from) : 0;
    }
    // Lane g finds what block g of the tile is: the least block ahead, and where each list has it.
    unsigned my_block = kNone;
    int my_place[kLists];
    const auto least_ahead = [&](unsigned (&ahead)[kLists]) {
      unsigned least = kNone;
#pragma unroll
      for (int i = 0; i < kLists; ++i) {
        ahead[i] = __shfl_sync(kFullWarp, block[i], taken[i]);
        least = ahead[i] < least ? ahead[i] : least;
      }
      return least;
    };
#pragma unroll
    for (int i = 0; i < kLists; ++i) my_place[i] = -1;
#pragma unroll 1
    for (int g = 0; g < kGather; ++g) {
      unsigned ahead[kLists];
      const unsigned least = least_ahead(ahead);
      if (lane == g) my_block = least;
#pragma unroll
      for (int i = 0; i < kLists; ++i) {
        if (ahead[i] != least || least == kNone) continue;
        if (lane == g) my_place[i] = taken[i];
        ++taken[i];
      }
    }
    unsigned ahead[kLists];
    const bool is_last = least_ahead(ahead) == kNone;
    my_block = InOrder(my_block);
    bool is_masked = !(my_block < static_cast<unsigned>(plan.blocks)), is_checked = false;
    int first = is_masked ? -1 : static_cast<int>(my_block) * kPlanKV;
    int rows[kLists];
#pragma unroll
    for (int i = 0; i < kLists; ++i) {
      const MaskId mask = MaskId::Of(__shfl_sync(kFullWarp, mask_id[i], my_place[i] & 31));
      const int id = mask.id;
      is_checked |= my_place[i] >= 0 && mask.is_checked;
      const bool is_valid = my_place[i] >= 0 && id >= -1 && id < plan.mask_blocks;
      rows[i] = !exists[i] || (is_valid && id < 0) ? kFull : is_valid ? id * kPlanKV : kAbsent;
      is_masked |= rows[i] != kFull;
    }
    is_masked |= !kv_rows.AllExist(Max(first, 0), kPlanKV) || is_checked;
    const bool by_pairs = rows[0] >= 0 || (is_checked && !checks_keys);
    if (lane < kGather) {
      to->first[lane] = first;
      if (kLeavesLists) to->is_checked[lane] = is_checked;
#pragma unroll
      for (int i = 0; i < kLists; ++i) to->mask_row[i][lane] = rows[i];
    }
    is_masked = __any_sync(kFullWarp, lane < kGather && is_masked);
    const bool by_keys = kMasksKeys && !__any_sync(kFullWarp, lane < kGather && by_pairs);
    __syncwarp();  // all lanes have read `at`
    if (lane == 0) {
      to->is_masked = !is_masked ? 0 : by_keys ? kByKeys : kByPairs, to->is_last = is_last;
#pragma unroll
      for (int i = 0; i < kLists; ++i) (kReadsFromEnd ? end[i] : at[i]) += kStep * taken[i];
    }
    __syncwarp();
  }
};

}  // namespace spattn
