// attention_bwd_sm90.cuh — sizes, work and shared memory of attention_bwd_sm90.cu, which says what they are
// for.
#pragma once
#include "cuda/device/bias_sums.cuh"
#include "cuda/device/matmul.cuh"
#include "cuda/device/warpgroup.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM, kHeadDimV = SPATTN_HEAD_DIM_V;
constexpr int kPlanBlock = SPATTN_PLAN_BLOCK;  // keys of an owned, queries of a passing block
constexpr int kTileKV = 128;                   // keys of a plan tile
constexpr int kTileQ = SPATTN_TILE_Q;          // queries of a passing tile
constexpr int kStages = SPATTN_STAGES, kDqBuffers = SPATTN_DQ_BUFFERS;
constexpr int kSlots = kStages + kDqBuffers;
constexpr int kHeads = 16;  // whose kv tiles start in turns, the first first
constexpr int kGroups = 2;  // that multiply
constexpr int kMathThreads = kGroups * kGroupThreads, kThreads = kMathThreads + kGroupThreads;
// Warps that add dq up, in turns: with one buffer one of them waits for a tile's turn while the other's
// addition is under way. The rest of the third group prepares.
constexpr int kAdders = kDqBuffers == 1 ? 2 : 1;
constexpr int kPrepareThreads = (3 - kAdders) * 32;
constexpr int kMathRegisters = 240, kCopyRegisters = 24;
constexpr int kGroupRows = 64;
constexpr int kOwned = kTileKV / kPlanBlock;          // blocks of a tile
constexpr int kGather = Max(kTileQ / kPlanBlock, 1);  // blocks of a passing tile
constexpr int kSplit = Max(kPlanBlock / kTileQ, 1);   // passing tiles of a block
constexpr int kRun = Min(kTileQ, kPlanBlock);         // queries that a block gives to a tile
constexpr int kPanels = CeilDiv(kHeadDim, 64), kPanelsV = CeilDiv(kHeadDimV, 64);
constexpr int kN = kTileQ / 8, kOut = PaddedDim(kHeadDim) / 8, kOutV = PaddedDim(kHeadDimV) / 8;
constexpr int kMaskWords = MaskWords(kTileKV);
// How the groups share dq: by queries, or by columns.
constexpr bool kSharesQueries = kTileQ == 2 * kGroupRows;
// dq: pieces of 16 columns, and n8 tiles of a group. By columns, the first group has kDqN * 8.
constexpr int kDqPieces = kOut / 2, kDqN = kSharesQueries ? kOut : CeilDiv(kDqPieces, 2) * 2;
static_assert(kHasWgmma && kHeadDim % 8 == 0 && kHeadDimV % 8 == 0, "whole units of 16 bytes");
static_assert((kSharesQueries || kTileQ == 64) && kDqN <= 8, "64 queries and a panel to a group");
static_assert(kGather * Max(kPanels, kPanelsV) <= 32, "a lane for each box");
constexpr bool kHasRule = SPATTN_RULE != 0;
static_assert(!kHasBias || !kHasSoftcap, "the gradient of the bias is ds without the cap's slope");

using KTile = Tile<kTileKV, kHeadDim>;
using VTile = Tile<kTileKV, kHeadDimV>;
using QTile = Tile<kTileQ, kHeadDim>;
using DoTile = Tile<kTileQ, kHeadDimV>;
using DsTile = Tile<kTileKV, kTileQ>;
constexpr int kFiniteSize = (kSharesQueries ? 1 : 2) * KTile::kPanel;  // elements of k_finite

// ---- work ----

// The kv tile of a CTA.
struct Owned {
  const SpattnCudaMappedBwdParams& mapped;
  int tile, kv_head, batch;

  // number: how many CTAs started before.
  DEVICE Owned Make(const SpattnCudaMappedBwdParams& mapped, unsigned number) {
    const unsigned tiles = mapped.call.by_kv.tiles, kv_heads = mapped.call.problem.kv_heads;
    if (mapped.sums.starts_with_last) {
      return {mapped, static_cast<int>(tiles - 1 - number % tiles),
              static_cast<int>(number / tiles % kv_heads),
              static_cast<int>(number / tiles / kv_heads)};
    }
    const unsigned all_heads = kv_heads * static_cast<unsigned>(mapped.call.problem.batch);
    const unsigned first = number / (tiles * kHeads) * kHeads,
                   heads = Min(all_heads - first, kHeads);
    const unsigned turn = number - first * tiles, head = first + turn % heads;
    return {mapped, static_cast<int>(turn / heads), static_cast<int>(head % kv_heads),
            static_cast<int>(head / kv_heads)};
  }

  __forceinline__ int PlanHead(int head) const { return mapped.call.by_kv.heads == 1 ? 0 : head; }
  // The row of the tile's key r, or -1.
  __forceinline__ int KeyRow(int r) const {
    const SpattnTilePlan& plan = mapped.call.by_kv;
    const int kv_len = static_cast<int>(mapped.call.problem.kv_len);
    const int at = (PlanHead(kv_head) * plan.tiles + tile) * kOwned + r / kPlanBlock;
    const int block = __ldg(plan.tile_blocks + at);
    const bool is_valid = block >= 0 && block <= kv_len / kPlanBlock;
    const int row = block * kPlanBlock + r % kPlanBlock;
    return is_valid && row < kv_len ? row : -1;
  }
  // The same without keys that the sequence does not have.
  __forceinline__ int KeyRowOfSequence(int r) const {
    const int32_t* lengths = mapped.call.problem.kv_lengths;
    const int row = KeyRow(r);
    return lengths == nullptr || row < __ldg(lengths + batch) ? row : -1;
  }
  __forceinline__ int FirstHead() const {
    return kv_head * (mapped.call.problem.heads / mapped.call.problem.kv_heads);
  }
  __forceinline__ int EndHead() const {
    return (kv_head + 1) * (mapped.call.problem.heads / mapped.call.problem.kv_heads);
  }
};

// The tile's list for a head, in the copy of the plan; where a rule leaves lists, the sequence's.
struct KvList {
  int begin, end;

  DEVICE KvList Make(const Owned& owned, int head) {
    const SpattnTilePlan& plan = owned.mapped.call.by_kv;
    const int2* lists = reinterpret_cast<const int2*>(owned.mapped.sums.lists);
    if (kLeavesLists) lists += static_cast<int64_t>(owned.batch) * plan.heads * plan.tiles;
    const int at = owned.PlanHead(head) * plan.tiles + owned.tile;
    const int2 list = __ldg(lists + at);
    return {list.x, list.y};
  }
  __forceinline__ int Tiles() const { return CeilDiv((end - begin) * kSplit, kGather); }
};

// What a passing tile consists of: run g gives its queries [g * kRun, (g + 1) * kRun).
struct Gathered {
  int first[kGather];     // its first query, or -1
  int mask_row[kGather];  // of mask_bits; -1: FULL
  int rank[kGather];
  int is_masked;
};

// ---- shared memory ----

// A number of every query of a tile, in the order in which the lanes of a multiplying warp read them:
// lane l has columns 8 n + 2 (l % 4) + j of its accumulators.
struct ColumnStats {
  static constexpr int kPitch = kTileQ / 4 + 4;  // the four lanes' parts lie in different banks
  float values[4 * kPitch];

  DEVICE int Place(int query) { return query % 8 / 2 * kPitch + query / 8 * 2 + query % 2; }
  // Of columns 8 n + 2 (lane % 4) + {0, 1}, and of those 8 columns on.
  __forceinline__ float4 Read(int n) const {
    return *reinterpret_cast<const float4*>(values + threadIdx.x % 4 * kPitch + n * 2);
  }
};

struct alignas(16) Smem {
  T k[KTile::kSize], v[VTile::kSize], k_finite[kFiniteSize];
  T q[kStages][QTile::kSize], dout[kStages][DoTile::kSize];
  T ds[kTileKV * kTileQ];
  float dq[kDqBuffers][kTileQ * kDqPieces * 16];
  ColumnStats lse_exp[kStages], delta[kStages];
  uint32_t mask[kStages][kTileQ * kMaskWords];  // of masked tiles alone
  uint32_t keys_exist[kMaskWords];              // a bit for each key of the tile; FindKeys
  Gathered gathered[kSlots];
  Mbarrier arrived[kStages], prepared[kStages], released[kStages];
  Mbarrier listed[kSlots];
  Mbarrier dq_filled[2], dq_emptied[kDqBuffers];
  unsigned number;
};

// What a rule needs besides; it lies behind Smem.
struct RuleSmem {
  int key_rows[kTileKV];  // or -1
  int key_segments[kHasSegments ? kTileKV : 1];
  int is_checked[kSlots][kGather];  // for segments and mask
  float slope[kStages];
  // Of relative_bias: the table of the tile's head; which distances the tile has; the least and the
  // greatest row of each 32 keys; and what each multiplying thread has added up beyond the reach.
  const float* bias[kHasBias ? kStages : 1];
  int reach[kHasBias ? kStages : 1];  // TileReach
  int least_row[kHasBias ? kMaskWords : 1], greatest_row[kHasBias ? kMaskWords : 1];
  float beyond[2][kSumsBias ? kMathThreads : 1];  // below and above
  // Of dropout:
  alignas(16) uint32_t query_words[kStages][kHasDropout ? kTileQ * 2 : 1];
  uint32_t key_words[kStages][kHasDropout ? kTileKV : 1];
};
// Whether all distances of a tile are beyond the reach of relative_bias, on one side.
enum TileReach { kIsWithin = 0, kIsBelow = 1, kIsAbove = 2 };
DEVICE RuleSmem& RuleOf(Smem& smem) { return reinterpret_cast<RuleSmem*>(&smem + 1)[0]; }
static_assert(sizeof(Smem) + (kHasRule ? sizeof(RuleSmem) : 0) <= SPATTN_SHARED_MEMORY,
              "the host counts fewer bytes");
// dk and dv leave through k, v and k_finite.
static_assert(2 * kTileKV * StorePitch(Max(kHeadDim, kHeadDimV)) <=
                  KTile::kSize + VTile::kSize + kFiniteSize,
              "they have room there");

// Named barriers; 0 is the CTA's.
constexpr int kMathBarrier = 1, kDsWritten = 2, kDsLeft = 3;

// The parity of the phase in which a barrier of one of `count` is about tile n.
template <int kCount>
DEVICE int Parity(unsigned n) {
  return n / kCount & 1;
}

// Calls work(head, i, n) for every passing tile: it is the i-th of a head's list, the n-th to pass.
template <typename Work>
DEVICE void ForEachTile(const Owned& owned, Work work) {
  unsigned n = 0;
#pragma unroll 1
  for (int head = owned.FirstHead(); head < owned.EndHead(); ++head) {
    const int tiles = KvList::Make(owned, head).Tiles();
#pragma unroll 1
    for (int i = 0; i < tiles; ++i, ++n) {
      work(head, owned.mapped.sums.starts_with_last ? i : tiles - 1 - i, n);
    }
  }
}

}  // namespace spattn
