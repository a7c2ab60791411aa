// attention_bwd_sm90.cu — block-sparse attention, backward, on sm_90a: all gradients by one kernel, with 5
// products for the 7 of attention_bwd_dq and attention_bwd_dkv.
//
// The math, and what an empty row, a masked NaN and a bad plan value come to, are those of these two.
//
// Mapping: one CTA per (kv tile, kv head, batch), one CTA an SM, past which the queries of the tile's
//          list go, for every head of the group, as in attention_bwd_dkv. Warp groups 0 and 1
//          multiply, each with 64 keys. Of warp group 2, warp 0 reads the lists and starts the copies
//          (Copy), the next one or two add dq up in device memory (AddDq), and the rest bring the
//          numbers of the queries and see to tiles that need a mask (Prepare).
// Tiles:   k, v, k_finite [kTileKV, dim]    k_finite: without NaN and Inf, and without keys past
//                                           kv_lengths, for dq alone
//          q, dout [kStages][kTileQ, dim]   brought by the copy engine, a box for each run
//          ds [kTileKV, kTileQ]             dsT as the groups have it, for dq alone
//          dq [kDqBuffers][kTileQ, dim] f32 on its way out, in units of 8 queries (StoreDq)
//          s_frag, dp_frag [64 keys, kTileQ] f32, registers
//          dk_frag, dv_frag [64 keys, dim] f32, registers
//          dq_frag [64, 64] f32, registers: 64 of 128 queries, or 64 of 128 columns
//
// Schedule of a multiplying group, for each passing tile n; s(n) is there:
//
//   dp = v doT                      queued
//   p                               beside dp
//   ds, and to shared memory
//   dv += p do                      queued; beside it both groups meet: ds is whole
//   dq = ds k_finite | dk += dsT q  queued together
//   s(n + 1) = k qT                 queued once dq is there
//   dq to shared memory             beside dk and s(n + 1)
//
//   All products are waited for where the loop turns, or ptxas serializes them (C7514).
//
// Order of dq: dq is added up in float32 in device memory, and the kv tiles that list a run of queries
//   add to it in one order, so that results are bitwise deterministic. attention_bwd_ranks has told
//   every entry of every list its rank among the tiles that list its block. AddDq waits until
//   `additions` of the run is its rank; rank 0 stores, the others add; then it counts. What the counts
//   have come to tells attention_bwd_finish which runs nobody lists.
//   No CTA waits for ever. Ranks follow the numbers that CTAs draw when they start (`started`). So a CTA
//   waits for CTAs alone that have started before it, hence are running or done, and the first of all
//   that run waits for none. A rank is reached because the ranks of a block's entries are 0, 1, 2, ...
//   and belong to different tiles, whatever the plan holds: both kernels read the lists in the copy
//   that attention_bwd_ranks has made, which no one else writes.
//
// Order of the tiles, for causal plans, where the first tiles have the longest lists and all lists end with
//   the last queries. The host chooses (StartsWithLast); plans of other shapes may take either.
//   last first   one head after the other. The list of tile t begins with the queries of tile t: at step i
//                its CTA follows that of the next tile at step i - 1 (head_dim 128: i - 2), and none
//                stands still. But the longest lists start last, and SMs run out of work meanwhile.
//   first first  kHeads heads in turns. Lists are gone through from the end, so that a CTA follows that of
//                the tile before one step behind, and the shortest lists come last. But whenever a
//                CTA is held up, so are all that follow it.
//
// Barriers of tile n. Stage, slot and buffer are n modulo kStages, kSlots and kDqBuffers.
//   of a stage   arrived      the copy engine: q and do are there
//                prepared     Prepare: the numbers of the queries; if the tile needs a mask, that too, and q
//                             and do are finite
//                released     every multiplying warp: the next tile may come
//   of a slot    listed       Copy: `gathered` says what the tile is. The slot is free when a stage is
//                             released for the second time after: before that, the multiplying warps
//                             wait for dq_emptied of the slot's tile, and AddDq reads no slot after that.
//   of a buffer  dq_emptied   AddDq: it has left
//   of n % 2     dq_filled    every multiplying warp. Two, whatever the buffers: an adder that takes every
//                             second tile must not take another's for its own
//   named        one of both groups: ds is whole; one for each group: the other has left ds
//   At listed and prepared every thread that has written arrives: that orders its own writes.
//
// Memory:  Smem.   Registers: 2 groups 240, the third 24: the sum is what the launch gives. Below 240
//          ptxas serializes the products (C7512), and so it does where k or v, or both copies of a
//          loop over s with and without a mask, take registers.
// Cost:    10 * head_dim FLOP per computed pair;
//          reads: k, v once; q and do once per kv tile that lists them, as attention_bwd_dkv; writes: dk,
//          dv; and 4 bytes of dq added in L2 for each query and column, per kv tile that lists it.
// Numerics: as attention_bwd_dkv; dq is summed in float32 over the tiles of 128 keys, as they start.
// After:   Shah et al. 2024 (arXiv:2407.08608): producer and consumers, the order of the products.
// Measured: H100, all, 4 x 16384, with the small kernels around it: 16 x 64 11.6 ms (attention_bwd_dq and
//          attention_bwd_dkv 14.8, cuDNN 13.5), 8 x 128 10.5 (13.8, 11.0): 490 and 540 TFLOP/s. The products
//          alone take 8.1; what was tried: benchmarks/results/gpu_kernels_h100.txt.
#include "cuda/device/matmul.cuh"
#include "cuda/device/warpgroup.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM;      // of v too
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
constexpr int kPanels = kHeadDim / 64;
constexpr int kN = kTileQ / 8, kOut = kHeadDim / 8;
constexpr int kMaskWords = MaskWords(kTileKV);
// How the groups share dq: by queries, or by columns.
constexpr bool kSharesQueries = kTileQ == 2 * kGroupRows;
static_assert(kHasWgmma && kHeadDim % 64 == 0, "panels of 64 columns");
static_assert(kSharesQueries ? kHeadDim == 64 : kTileQ == 64 && kHeadDim == 128,
              "dq_frag is 64 x 64");
static_assert(kGather * kPanels <= 32, "a lane for each box");

using KTile = Tile<kTileKV, kHeadDim>;
using QTile = Tile<kTileQ, kHeadDim>;
using DsTile = Tile<kTileKV, kTileQ>;

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

// The tile's list for a head, in the copy of the plan.
struct KvList {
  int begin, end;

  DEVICE KvList Make(const Owned& owned, int head) {
    const int at = owned.PlanHead(head) * owned.mapped.call.by_kv.tiles + owned.tile;
    const int2 list = __ldg(reinterpret_cast<const int2*>(owned.mapped.sums.lists) + at);
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

struct Smem {
  T k[kTileKV * kHeadDim], v[kTileKV * kHeadDim], k_finite[kTileKV * kHeadDim];
  T q[kStages][kTileQ * kHeadDim], dout[kStages][kTileQ * kHeadDim];
  T ds[kTileKV * kTileQ];
  float dq[kDqBuffers][kTileQ * kHeadDim];
  ColumnStats lse_exp[kStages], delta[kStages];
  uint32_t mask[kStages][kTileQ * kMaskWords];  // of masked tiles alone
  uint32_t keys_exist[kMaskWords];              // a bit for each key of the tile
  Gathered gathered[kSlots];
  Mbarrier arrived[kStages], prepared[kStages], released[kStages];
  Mbarrier listed[kSlots];
  Mbarrier dq_filled[2], dq_emptied[kDqBuffers];
  unsigned number;
};
static_assert(sizeof(Smem) <= SPATTN_SHARED_MEMORY, "the host counts fewer bytes");
// dk and dv leave through k, v and k_finite.
static_assert(2 * StorePitch(kHeadDim) <= 3 * kHeadDim, "they have room there");

// Named barriers; 0 is the CTA's.
constexpr int kMathBarrier = 1, kDsWritten = 2, kDsLeft = 3;

// The parity of the phase in which a barrier of one of `count` is about tile n.
template <int kCount>
DEVICE int Parity(unsigned n) {
  return n / kCount & 1;
}

// ---- the copying group ----

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

// Warp 0: reads the lists, and starts the copies of q and do. Queries that do not exist, and those of
// absent blocks, become zeros.
DEVICE void Copy(Smem& smem, const Owned& owned) {
  const SpattnCudaMappedBwdParams& mapped = owned.mapped;
  const SpattnCudaDqSums& sums = mapped.sums;
  const int lane = threadIdx.x % 32, q_len = static_cast<int>(mapped.call.problem.q_len);
  bool all_keys = true;
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    const uint32_t word = __ballot_sync(kFullWarp, owned.KeyRowOfSequence(w * 32 + lane) >= 0);
    if (lane == 0) smem.keys_exist[w] = word;  // before the first tile is listed
    all_keys &= word == kFullWarp;
  }
  ForEachTile(owned, [&](int head, int i, unsigned n) {
    const KvList list = KvList::Make(owned, head);
    const int at = list.begin + (kSplit > 1 ? i / kSplit : i * kGather + lane), sub = i % kSplit;
    const bool is_listed = lane < kGather && at < list.end;
    const int block = is_listed ? __ldg(sums.indices + at) : -1;
    const int mask_id = is_listed ? __ldg(sums.mask_ids + at) : -1;
    const int rank = is_listed ? __ldg(sums.ranks + at) : 0;
    int first = block < 0 ? -1 : block * kPlanBlock + sub * kTileQ;
    if (first >= q_len) first = -1;
    const bool is_masked =
        !all_keys || __any_sync(kFullWarp, lane < kGather &&
                                               (first < 0 || mask_id >= 0 || first + kRun > q_len));
    const int stage = n % kStages, slot = n % kSlots;
    smem.released[stage].Wait(Parity<kStages>(n) ^ 1);
    Gathered& tile = smem.gathered[slot];
    if (lane < kGather) {
      tile.first[lane] = first;
      tile.mask_row[lane] = mask_id < 0 ? -1 : mask_id * kPlanBlock + sub * kTileQ;
      tile.rank[lane] = rank;
    }
    if (lane == 0) {
      tile.is_masked = is_masked;
      smem.arrived[stage].ArriveAndExpect(2 * QTile::kBytes);
    }
    smem.listed[slot].Arrive();
    const int g = lane % kGather, panel = lane / kGather;
    const int row = __shfl_sync(kFullWarp, first < 0 ? q_len : first, g);
    if (lane < kGather * kPanels) {
      const int to = panel * QTile::kPanel + g * kRun * 64;
      CopyBox(smem.q[stage] + to, mapped.q, panel * 64, row, head, owned.batch,
              smem.arrived[stage]);
      CopyBox(smem.dout[stage] + to, mapped.dout, panel * 64, row, head, owned.batch,
              smem.arrived[stage]);
    }
    __syncwarp();
  });
}

// Warps 2 and 3: lse_exp and delta of all tiles; of those that need one the mask. Of these q and do
// become finite: a masked query's NaN must not meet its p = 0 or ds = 0, and a key that may be paired
// with it has NaN from its lse_exp.
DEVICE void Prepare(Smem& smem, const Owned& owned) {
  const SpattnCudaBwdParams& call = owned.mapped.call;
  ForEachTile(owned, [&](int head, int, unsigned n) {
    const int stage = n % kStages, thread = Opaque(threadIdx.x) % kPrepareThreads;
    const Gathered& tile = smem.gathered[n % kSlots];
    smem.listed[n % kSlots].Wait(Parity<kSlots>(n));  // and the stage is released
    const int q_len = static_cast<int>(call.problem.q_len);
    const int stats_at = (owned.batch * call.problem.heads + head) * q_len;  // less than 2^31
    const auto row_of = [&](int r) {
      const int first = tile.first[r / kRun], row = first + r % kRun;
      return first >= 0 && row < q_len ? row : -1;
    };
#pragma unroll 1
    for (int r = thread; r < kTileQ; r += kPrepareThreads) {
      const int row = row_of(r), at = stats_at + Max(row, 0);
      const float lse_exp = __ldg(call.lse_exp + at), delta = __ldg(call.delta + at);
      const int place = ColumnStats::Place(Opaque(r));
      smem.lse_exp[stage].values[place] = row >= 0 ? lse_exp : kInf;
      smem.delta[stage].values[place] = row >= 0 ? delta : 0;
    }
    if (tile.is_masked) {
#pragma unroll 1
      for (int r = thread; r < kTileQ; r += kPrepareThreads) {
        const int mask_row = tile.mask_row[r / kRun];
        const uint32_t all = row_of(r) >= 0 ? kFullWarp : 0;
        uint4 words{all, all, all, all};
        if (all && mask_row >= 0) {
          words = __ldg(reinterpret_cast<const uint4*>(call.by_kv.mask_bits) +
                        (static_cast<int64_t>(mask_row) + r % kRun));
        }
        uint32_t* to = smem.mask[stage] + r * kMaskWords;
        to[0] = words.x & smem.keys_exist[0];
        to[1] = words.y & smem.keys_exist[1];
        to[2] = words.z & smem.keys_exist[2];
        to[3] = words.w & smem.keys_exist[3];
      }
      smem.arrived[stage].Wait(Parity<kStages>(n));
#pragma unroll 1
      for (int t = 0; t < 2; ++t) {
        T* rows = t == 0 ? smem.q[stage] : smem.dout[stage];
#pragma unroll 1
        for (int i = thread; i < QTile::kBytes / 16; i += kPrepareThreads) {
          ZeroNonfinite(reinterpret_cast<uint4*>(rows) + i);
        }
      }
      FenceForWgmma();
    }
    smem.prepared[stage].Arrive();
  });
}

// One of the warps that add dq up, a lane for each run.
DEVICE void AddDq(Smem& smem, const Owned& owned, int adder) {
  const SpattnCudaDqSums& sums = owned.mapped.sums;
  const int lane = threadIdx.x % 32;
  ForEachTile(owned, [&](int head, int, unsigned n) {
    if (static_cast<int>(n % kAdders) != adder) return;
    const int slot = n % kSlots, buffer = n % kDqBuffers;
    smem.listed[slot].Wait(Parity<kSlots>(n));
    const int first = lane < kGather ? smem.gathered[slot].first[lane] : -1;
    const int rank = lane < kGather ? smem.gathered[slot].rank[lane] : 0;
    const int64_t sequence_head =
        static_cast<int64_t>(owned.batch) * owned.mapped.call.problem.heads + head;
    const int64_t run = sequence_head * sums.runs + Max(first, 0) / kRun;
    if (first >= 0) WaitForCount(sums.additions + run, rank);
    __syncwarp();
    smem.dq_filled[n % 2].Wait(Parity<2>(n));
    if (first >= 0) {
      constexpr int kFloats = kRun * kHeadDim;
      float* to = sums.dq + run * kFloats;
      const float* from = smem.dq[buffer] + lane * kFloats;
      if (rank == 0) {
        BulkStore(to, from, kFloats * 4);
      } else {
        BulkAdd(to, from, kFloats * 4);
      }
      BulkCommit();
      BulkWaitForReads();
    }
    __syncwarp();
    if (lane == 0) smem.dq_emptied[buffer].Arrive();
    if (first >= 0) {
      BulkWait();
      AddRelease(sums.additions + run);
    }
    __syncwarp();
  });
}

// ---- a multiplying group ----

// s becomes p, whatever pairs are allowed.
DEVICE void Probabilities(float (&s)[1][kN][4], float scale_exp, const ColumnStats& lse_exp) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    const float4 columns = lse_exp.Read(n);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float *left = &s[0][n][h * 2], *right = &s[0][n + 1][h * 2];
      left[0] = Exp(fmaf(left[0], scale_exp, -columns.x));
      left[1] = Exp(fmaf(left[1], scale_exp, -columns.y));
      right[0] = Exp(fmaf(right[0], scale_exp, -columns.z));
      right[1] = Exp(fmaf(right[1], scale_exp, -columns.w));
    }
  }
}

// dp becomes ds = p * (dp - delta).
DEVICE void ScoreGradient(float (&dp)[1][kN][4], const float (&p)[1][kN][4],
                          const ColumnStats& delta) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    const float4 columns = delta.Read(n);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float *left = &dp[0][n][h * 2], *right = &dp[0][n + 1][h * 2];
      const float *p_left = &p[0][n][h * 2], *p_right = &p[0][n + 1][h * 2];
      left[0] = p_left[0] * (left[0] - columns.x);
      left[1] = p_left[1] * (left[1] - columns.y);
      right[0] = p_right[0] * (right[0] - columns.z);
      right[1] = p_right[1] * (right[1] - columns.w);
    }
  }
}

// Where a pair is not allowed p and ds become 0, whatever they were.
DEVICE void KeepAllowed(float (&c)[1][kN][4], const uint32_t* mask_smem) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t allowed = FragmentMask<kTileKV, 16>(mask_smem, 0, n, j);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!(allowed >> (h * 8) & 1)) c[0][n][h * 2 + j] = 0;
      }
    }
  }
}

// Writes 16 rows of dsT, in fragments, to their place in a DsTile.
DEVICE void StoreDs(T* ds_smem, const uint32_t (&ds)[kN / 2][1][4], int first_row) {
  const int lane = threadIdx.x % 32, row = first_row + lane % 16;
#pragma unroll
  for (int k = 0; k < kN / 2; ++k) {
    const uint32_t to = SmemAddress(ds_smem + DsTile::Offset(row, (k * 2 + lane / 16) * 8));
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(to),
                 "r"(ds[k][0][0]), "r"(ds[k][0][1]), "r"(ds[k][0][2]), "r"(ds[k][0][3])
                 : "memory");
  }
}

// Writes a group's part of dq, 64 x 64, where AddDq takes it from. A unit of 8 queries is kHeadDim / 16
// pieces of 16 columns, and a piece is a float4 of each lane as it holds it: columns 16 c + 2 (lane %
// 4) + {0, 1, 8, 9} of query lane / 4. So a run of any block size is contiguous, and nothing is
// shuffled but once, by attention_bwd_finish.
DEVICE void StoreDq(float* dq_smem, const float (&dq)[1][8][4], int group) {
  constexpr int kPieces = kHeadDim / 16, kPiece = 32 * 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int first_unit = (kSharesQueries ? group * 8 : 0) + warp * 2;
  const int first_piece = kSharesQueries ? 0 : group * 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* to = dq_smem + ((first_unit + h) * kPieces + first_piece) * kPiece + lane * 4;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      *reinterpret_cast<float4*>(to + c * kPiece) = {dq[0][c * 2][h * 2], dq[0][c * 2][h * 2 + 1],
                                                     dq[0][c * 2 + 1][h * 2],
                                                     dq[0][c * 2 + 1][h * 2 + 1]};
    }
  }
}

// Brings k and v, by both groups.
DEVICE void LoadKeys(Smem& smem, const Owned& owned) {
  const SpattnCudaBwdParams& call = owned.mapped.call;
  const RowSpan k = RowSpan::Make(call.k, owned.batch, owned.kv_head),
                v = RowSpan::Make(call.v, owned.batch, owned.kv_head);
  LoadRowPair<kTileKV, kHeadDim, kHeadDim, kMathThreads, false>(
      smem.k, k, smem.v, v, [&](int r) { return owned.KeyRow(r); });
  LoadRows<kTileKV, kHeadDim, kMathThreads, false>(
      smem.k_finite, k, [&](int r) { return owned.KeyRowOfSequence(r); });
  CopyCommit();
  CopyWait<0>();
  // A masked key's NaN must not meet its ds = 0. A query that does attend to it has ds NaN anyway.
  ZeroNonfiniteRows<kTileKV, kHeadDim, kMathThreads>(smem.k_finite);
  FenceForWgmma();
  BarrierSync(kMathBarrier, kMathThreads);
}

DEVICE void Multiply(Smem& smem, const Owned& owned, int group) {
  const SpattnCudaBwdParams& call = owned.mapped.call;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const float scale_exp = call.problem.softmax_scale * kExpScale;
  unsigned tiles = 0;
#pragma unroll 1
  for (int head = owned.FirstHead(); head < owned.EndHead(); ++head) {
    tiles += KvList::Make(owned, head).Tiles();
  }
  LoadKeys(smem, owned);
  BarrierArrive(kDsLeft + 1 - group, kMathThreads);

  RowOperand<1, KTile, false> k, v;
  float dk_frag[1][kOut][4] = {}, dv_frag[1][kOut][4] = {};
  float s_frag[1][kN][4];
  const auto queue_scores = [&](unsigned n, float (&s)[1][kN][4]) {
    const int stage = n % kStages;
    smem.arrived[stage].Wait(Parity<kStages>(n));
    smem.prepared[stage].Wait(Parity<kStages>(n));
    k.group = SmemOperand::Make(smem.k + group * kGroupRows * 64);
    MatmulABt<QTile>(s, k, SmemOperand::Make(smem.q[stage]), nullptr);
  };
  if (tiles > 0) {
    queue_scores(0, s_frag);
    MatmulWait<0>(s_frag);
  }
#pragma unroll 1
  for (unsigned n = 0; n < tiles; ++n) {
    const int stage = n % kStages, buffer = n % kDqBuffers;
    const T *q_smem = smem.q[stage], *do_smem = smem.dout[stage];
    const bool is_masked = smem.gathered[n % kSlots].is_masked;

    float dp_frag[1][kN][4];
    v.group = SmemOperand::Make(smem.v + group * kGroupRows * 64);
    MatmulABt<QTile>(dp_frag, v, SmemOperand::Make(do_smem), nullptr);
    Probabilities(s_frag, scale_exp, smem.lse_exp[stage]);
    if (is_masked) KeepAllowed(s_frag, smem.mask[stage]);
    MatmulWait<0>(dp_frag);
    ScoreGradient(dp_frag, s_frag, smem.delta[stage]);
    if (is_masked) KeepAllowed(dp_frag, smem.mask[stage]);
    uint32_t p_frag[kN / 2][1][4], ds_frag[kN / 2][1][4];
    PackAllFragments(p_frag, s_frag);
    PackAllFragments(ds_frag, dp_frag);

    BarrierSync(kDsLeft + group, kMathThreads);  // dq of the tile before does not read ds any more
    StoreDs(smem.ds, ds_frag, warp_row);
    WgmmaPB<QTile>(dv_frag, p_frag, SmemOperand::Make(do_smem));
    FenceForWgmma();  // takes long: beside dv
    BarrierSync(kDsWritten, kMathThreads);
    float dq_frag[1][8][4];
    WgmmaAtB<kTileKV>(
        dq_frag, SmemOperand::Make(smem.ds + (kSharesQueries ? group * DsTile::kPanel : 0)),
        SmemOperand::Make(smem.k_finite + (kSharesQueries ? 0 : group * KTile::kPanel)));
    WgmmaPB<QTile>(dk_frag, ds_frag, SmemOperand::Make(q_smem));
    MatmulWait<1>(dv_frag, dq_frag);
    BarrierArrive(kDsLeft + 1 - group, kMathThreads);

    queue_scores(n + 1 < tiles ? n + 1 : n, s_frag);  // of the last tile again: no branch here
    smem.dq_emptied[buffer].Wait(Parity<kDqBuffers>(n) ^ 1);
    StoreDq(smem.dq[buffer], dq_frag, group);
    FenceForWgmma();  // visible to the bulk copies too
    __syncwarp();
    if (lane == 0) smem.dq_filled[n % 2].Arrive();
    MatmulWait<1>(dk_frag);
    __syncwarp();
    if (lane == 0) smem.released[stage].Arrive();
    MatmulWait<0>(s_frag);
  }

  // ---- epilogue ----

  // The other group has left k, v and k_finite, but for an s that nobody wants.
  BarrierSync(kDsLeft + group, kMathThreads);
#pragma unroll
  for (int i = 0; i < kOut * 4; ++i) dk_frag[0][i / 4][i % 4] *= call.problem.softmax_scale;
  const auto row_of = [&](int r) { return owned.KeyRow(warp_row + r); };
  const auto zero_of = [&](int r) { return owned.KeyRowOfSequence(warp_row + r) < 0; };
  constexpr int kPitch = StorePitch(kHeadDim);
  StoreRows<kHeadDim>(dk_frag, smem.k + warp_row * kPitch,
                      RowSpan::Make(call.dk, owned.batch, owned.kv_head), 0, row_of, zero_of);
  StoreRows<kHeadDim>(dv_frag, smem.k + (kTileKV + warp_row) * kPitch,
                      RowSpan::Make(call.dv, owned.batch, owned.kv_head), 0, row_of, zero_of);
}

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_sm90(const __grid_constant__ SpattnCudaMappedBwdParams mapped) {
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      smem.arrived[i].Init(1);
      smem.prepared[i].Init(kPrepareThreads);
      smem.released[i].Init(kMathThreads / 32);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) smem.listed[i].Init(32);
    for (Mbarrier& filled : smem.dq_filled) filled.Init(kMathThreads / 32);
    for (Mbarrier& emptied : smem.dq_emptied) emptied.Init(1);
    FenceMbarrierInit();
    smem.number = atomicAdd(mapped.sums.started, 1);
  }
  __syncthreads();
  const Owned owned = Owned::Make(mapped, __shfl_sync(kFullWarp, smem.number, 0));
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  if (group == kGroups) {
    GiveRegisters<kCopyRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
      Copy(smem, owned);
    } else if (warp <= kAdders) {
      AddDq(smem, owned, warp - 1);
    } else {
      Prepare(smem, owned);
    }
  } else {
    TakeRegisters<kMathRegisters>();
    Multiply(smem, owned, group);
  }
}

}  // namespace spattn
