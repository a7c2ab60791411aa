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
//                                           kv_lengths, for dq alone. Where the groups share dq by
//                                           columns, each group's part begins a panel
//          q, dout [kStages][kTileQ, dim]   brought by the copy engine, a box for each run
//          ds [kTileKV, kTileQ]             dsT as the groups have it, for dq alone
//          dq [kDqBuffers][kTileQ, dim] f32 on its way out, in units of 8 queries (StoreDq)
//          All but dq are in whole panels of 64 columns: those past the dim are zeros, and are
//          multiplied up to the next multiple of 16
//          s_frag, dp_frag [64 keys, kTileQ] f32, registers
//          dk_frag, dv_frag [64 keys, dim] f32, registers
//          dq_frag [64, kDqN * 8] f32, registers: 64 of 128 queries, or half of the columns
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
//                released     the multiplying groups: the next tile may come
//   of a slot    listed       Copy: `gathered` says what the tile is. The slot is free when a stage is
//                             released for the second time after: before that, the multiplying warps
//                             wait for dq_emptied of the slot's tile, and AddDq reads no slot after that.
//   of a buffer  dq_emptied   AddDq: it has left
//   of n % 2     dq_filled    every multiplying warp, with one lane. Two, whatever the buffers: an adder that
//                             takes every second tile must not take another's for its own
//   named        one of both groups: ds is whole; one for each group: the other has left ds
//   At all but dq_filled, which is for bulk copies, every thread arrives that has written or read what other
//   threads read or write: that orders its own accesses, as compute-sanitizer's racecheck sees too.
//
// Rules:   attention_bwd_sm90_rule.cuh; all but relative_bias with a soft cap. Segments and mask join the
//          bits of the tiles that need a mask, and each sequence has lists and ranks of its own. A key that
//          nobody attends to, as one of padding, gives no tile a mask: its ds and its gradients are set to
//          zero (FindKeys). What a tile's scores need besides the fragments lies in shared memory
//          (RuleSmem), as the multiplying groups have few registers.
//          A tile whose distances are all beyond the reach of relative_bias has one bias, which Prepare
//          takes from lse_exp, and one sum of ds. Of the others ds is added up as dq reads it, by
//          distances (BiasStrip).
//
// Memory:  Smem, and RuleSmem behind it.   Registers: 2 groups 240, the third 24: the sum is what the
//          launch gives. Below 240 ptxas serializes the products (C7512), and so it does where k or v,
//          or both copies of a loop over s with and without a mask, take registers.
// Cost:    10 * head_dim FLOP per computed pair;
//          reads: k, v once; q and do once per kv tile that lists them, as attention_bwd_dkv; writes: dk,
//          dv; and 4 bytes of dq added in L2 for each query and column, per kv tile that lists it.
// Numerics: as attention_bwd_dkv, with dropout too; dq is summed in float32 over the tiles of 128 keys,
//          as they start.
// After:   Shah et al. 2024 (arXiv:2407.08608): producer and consumers, the order of the products.
// Measured: H100, all, 4 x 16384, with the small kernels around it: 16 x 64 11.6 ms (attention_bwd_dq and
//          attention_bwd_dkv 14.8, cuDNN 13.5), 8 x 128 10.5 (13.8, 11.0): 490 and 540 TFLOP/s. The products
//          alone take 8.1; what was tried: benchmarks/results/gpu_kernels_h100.txt.
#include "cuda/device/attention_bwd_sm90_rule.cuh"

namespace spattn {

// ---- the copying group ----

// Warp 0: reads the lists, and starts the copies of q and do. Queries that do not exist, and those of
// absent blocks, become zeros.
DEVICE void Copy(Smem& smem, const Owned& owned, const SpattnCudaRule& rule) {
  const SpattnCudaMappedBwdParams& mapped = owned.mapped;
  const SpattnCudaDqSums& sums = mapped.sums;
  const int lane = threadIdx.x % 32, q_len = static_cast<int>(mapped.call.problem.q_len);
  bool all_keys = true;
#pragma unroll
  for (int w = 0; !kHasRule && w < kMaskWords; ++w) {
    const uint32_t word = __ballot_sync(kFullWarp, owned.KeyRowOfSequence(w * 32 + lane) >= 0);
    if (lane == 0) smem.keys_exist[w] = word;  // before the first tile is listed
    all_keys &= word == kFullWarp;
  }
  ForEachTile(owned, [&](int head, int i, unsigned n) {
    const KvList list = KvList::Make(owned, head);
    const int at = list.begin + (kSplit > 1 ? i / kSplit : i * kGather + lane), sub = i % kSplit;
    const bool is_listed = lane < kGather && at < list.end;
    const int64_t first_entry =
        kLeavesLists ? static_cast<int64_t>(owned.batch) * mapped.call.by_kv.entries : 0;
    const int block = is_listed ? __ldg(sums.indices + first_entry + at) : -1;
    const int entry = is_listed ? __ldg(sums.mask_ids + first_entry + at) : kLeavesLists ? 0 : -1;
    const int mask_id = kLeavesLists ? MaskId::Of(entry).id : entry;
    const int rank = is_listed ? __ldg(sums.ranks + first_entry + at) : 0;
    // Which keys are masked for all queries FindKeys has found.
    const bool is_checked =
        MaskId::Of(entry).is_checked && (kHasMask || rule.q_segments != nullptr);
    int first = block < 0 ? -1 : block * kPlanBlock + sub * kTileQ;
    if (first >= q_len) first = -1;
    const bool is_masked =
        !all_keys || __any_sync(kFullWarp, lane < kGather && (first < 0 || mask_id >= 0 ||
                                                              is_checked || first + kRun > q_len));
    const int stage = n % kStages, slot = n % kSlots;
    smem.released[stage].Wait(Parity<kStages>(n) ^ 1);
    Gathered& tile = smem.gathered[slot];
    if (lane < kGather) {
      tile.first[lane] = first;
      tile.mask_row[lane] = mask_id < 0 ? -1 : mask_id * kPlanBlock + sub * kTileQ;
      tile.rank[lane] = rank;
      if (kLeavesLists) RuleOf(smem).is_checked[slot][lane] = is_checked;
    }
    if (lane == 0) {
      tile.is_masked = is_masked;
      smem.arrived[stage].ArriveAndExpect(QTile::kBytes + DoTile::kBytes);
    }
    smem.listed[slot].Arrive();
    const int g = lane % kGather, panel = lane / kGather;
    const int row = __shfl_sync(kFullWarp, first < 0 ? q_len : first, g);
    if (lane < kGather * Max(kPanels, kPanelsV)) {
      const int to = panel * QTile::kPanel + g * kRun * 64;
      if (kPanels >= kPanelsV || panel < kPanels) {
        CopyBox(smem.q[stage] + to, mapped.q, panel * 64, row, head, owned.batch,
                smem.arrived[stage]);
      }
      if (kPanelsV >= kPanels || panel < kPanelsV) {
        CopyBox(smem.dout[stage] + to, mapped.dout, panel * 64, row, head, owned.batch,
                smem.arrived[stage]);
      }
    }
    __syncwarp();
  });
}

// The warps behind AddDq's bring lse_exp and delta of all tiles and what a rule needs besides, and make the
// masks of those tiles that need one. In these q and do become finite: a masked query's NaN must not meet
// its p = 0 or ds = 0, and a key that may be paired with it has NaN from its lse_exp.
DEVICE void Prepare(Smem& smem, const Owned& owned, const SpattnCudaRule& rule) {
  const SpattnCudaBwdParams& call = owned.mapped.call;
  const float delta_times = kHasDropout ? 1 / rule.kept_times : 1;
  int last_head = -1, left_stages = 0;  // stages that still lack what the head's tiles share
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
    float edge = 0;  // the bias of all pairs, if there is one
    if (kHasBias) {
      const float* bias = rule.relative_bias +
                          (rule.bias_heads == 1 ? 0 : head * (2 * int64_t{rule.bias_reach} - 1));
      const TileReach reach = ReachOf(smem, rule, tile);
      if (reach != kIsWithin) {
        edge = __ldg(bias + (reach == kIsAbove ? 2 * rule.bias_reach - 2 : 0)) * kExpScale;
      }
      if (thread == 0) RuleOf(smem).bias[stage] = bias, RuleOf(smem).reach[stage] = reach;
    }
#pragma unroll 1
    for (int r = thread; r < kTileQ; r += kPrepareThreads) {
      const int row = row_of(r), at = stats_at + Max(row, 0);
      const float lse_exp = __ldg(call.lse_exp + at), delta = __ldg(call.delta + at);
      const int place = ColumnStats::Place(Opaque(r));
      smem.lse_exp[stage].values[place] = row >= 0 ? lse_exp - edge : kInf;
      smem.delta[stage].values[place] = row >= 0 ? delta * delta_times : 0;
      if (kHasDropout) {
        const uint2 words = __ldg(
            reinterpret_cast<const uint2*>(QueryWords(rule, call.problem, owned.batch, head)) +
            Max(row, 0));
        reinterpret_cast<uint2*>(RuleOf(smem).query_words[stage])[r] = words;
      }
    }
    if (head != last_head) last_head = head, left_stages = kStages;
    if (kHasDropout && left_stages > 0) {
      const uint32_t* words = KeyWords(rule, call.problem, owned.batch, head);
#pragma unroll 1
      for (int r = thread; r < kTileKV; r += kPrepareThreads) {
        RuleOf(smem).key_words[stage][r] = __ldg(words + Max(RuleOf(smem).key_rows[r], 0));
      }
    }
    if (kHasAlibi && left_stages > 0) {
      if (thread == 0) RuleOf(smem).slope[stage] = __ldg(rule.alibi_slopes + head) * kExpScale;
    }
    --left_stages;
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
        if (kLeavesLists) {
          Restricted(smem, owned, rule, head, words, row_of(r),
                     RuleOf(smem).is_checked[n % kSlots][r / kRun]);
        }
        to[0] = words.x & smem.keys_exist[0];
        to[1] = words.y & smem.keys_exist[1];
        to[2] = words.z & smem.keys_exist[2];
        to[3] = words.w & smem.keys_exist[3];
      }
      smem.arrived[stage].Wait(Parity<kStages>(n));
#pragma unroll 1
      for (int t = 0; t < 2; ++t) {
        T* rows = t == 0 ? smem.q[stage] : smem.dout[stage];
        const int bytes = t == 0 ? QTile::kBytes : DoTile::kBytes;
#pragma unroll 1
        for (int i = thread; i < bytes / 16; i += kPrepareThreads) {
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
      constexpr int kFloats = kRun * kDqPieces * 16;
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
    smem.dq_emptied[buffer].Arrive();
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

DEVICE float DsOf(float p, float dp, float delta) {
  if (kHasDropout) return fmaf(fmaxf(p, 0), dp, -fabsf(p) * delta);
  return p * (dp - delta);
}

// dp becomes ds = p * (dp - delta); where p is less than 0, p * delta.
DEVICE void ScoreGradient(float (&dp)[1][kN][4], const float (&p)[1][kN][4],
                          const ColumnStats& delta) {
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    const float4 columns = delta.Read(n);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float *left = &dp[0][n][h * 2], *right = &dp[0][n + 1][h * 2];
      const float *p_left = &p[0][n][h * 2], *p_right = &p[0][n + 1][h * 2];
      left[0] = DsOf(p_left[0], left[0], columns.x);
      left[1] = DsOf(p_left[1], left[1], columns.y);
      right[0] = DsOf(p_right[0], right[0], columns.z);
      right[1] = DsOf(p_right[1], right[1], columns.w);
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

// The same where they are packed.
DEVICE void KeepAllowed(uint32_t (&c)[kN / 2][1][4], const uint32_t* mask_smem) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    const uint32_t left = FragmentMask<kTileKV, 16>(mask_smem, 0, n, 0),
                   right = FragmentMask<kTileKV, 16>(mask_smem, 0, n, 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      c[n / 2][0][n % 2 * 2 + h] &=
          (left >> (h * 8) & 1 ? 0xffffu : 0) | (right >> (h * 8) & 1 ? 0xffff0000u : 0);
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

// Writes a group's part of dq where AddDq takes it from. A unit of 8 queries is kDqPieces pieces of 16
// columns, and a piece is a float4 of each lane as it holds it: columns 16 c + 2 (lane % 4) +
// {0, 1, 8, 9} of query lane / 4. So a run of any block size is contiguous, and nothing is shuffled but
// once, by attention_bwd_finish.
DEVICE void StoreDq(float* dq_smem, const float (&dq)[1][kDqN][4], int group) {
  constexpr int kPiece = 32 * 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  const int first_unit = (kSharesQueries ? group * 8 : 0) + warp * 2;
  const int first_piece = kSharesQueries ? 0 : group * (kDqN / 2);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float* to = dq_smem + ((first_unit + h) * kDqPieces + first_piece) * kPiece + lane * 4;
#pragma unroll
    for (int c = 0; c < kDqN / 2; ++c) {
      // With an odd number of pieces the second group has one less.
      if (!kSharesQueries && kDqN / 2 + c >= kDqPieces && group == 1) continue;
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
  LoadRowPair<kTileKV, kHeadDim, kHeadDimV, kMathThreads, false>(
      smem.k, k, smem.v, v, [&](int r) { return owned.KeyRow(r); });
  // The columns that a panel of k_finite begins with, and where that is not as k lies, the second's.
  constexpr bool kIsAsK = kSharesQueries || kDqN == 8;
  constexpr int kFirst = kIsAsK ? kHeadDim : kDqN * 8, kSecond = kHeadDim - kFirst;
  const auto key_row = [&](int r) { return owned.KeyRowOfSequence(r); };
  LoadRows<kTileKV, kFirst, kMathThreads, false>(smem.k_finite, k, key_row);
  if constexpr (kSecond > 0) {
    LoadRows<kTileKV, kSecond, kMathThreads, false>(smem.k_finite + KTile::kPanel, k.From(kFirst),
                                                    key_row);
  }
  CopyCommit();
  CopyWait<0>();
  // A masked key's NaN must not meet its ds = 0. A query that does attend to it has ds NaN anyway.
  ZeroNonfiniteRows<kTileKV, kFirst, kMathThreads>(smem.k_finite);
  if constexpr (kSecond > 0) {
    ZeroNonfiniteRows<kTileKV, kSecond, kMathThreads>(smem.k_finite + KTile::kPanel);
  }
  FenceForWgmma();
  BarrierSync(kMathBarrier, kMathThreads);
}

DEVICE void Multiply(Smem& smem, const Owned& owned, const SpattnCudaRule& rule, int group) {
  const SpattnCudaBwdParams& call = owned.mapped.call;
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * 16;
  const float scale_exp =
      call.problem.softmax_scale * (kHasSoftcap ? 1 / rule.logit_softcap : kExpScale);
  unsigned tiles = 0;
#pragma unroll 1
  for (int head = owned.FirstHead(); head < owned.EndHead(); ++head) {
    tiles += KvList::Make(owned, head).Tiles();
  }
  LoadKeys(smem, owned);
  BiasStrip strip{owned, rule, 0, 0};
  if constexpr (kSumsBias) strip.Init(smem);
  BarrierArrive(kDsLeft + 1 - group, kMathThreads);

  RowOperand<1, KTile, false> k;
  RowOperand<1, VTile, false> v;
  float dk_frag[1][kOut][4] = {}, dv_frag[1][kOutV][4] = {};
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

    const int reach = kHasBias ? RuleOf(smem).reach[stage] : 0;

    float dp_frag[1][kN][4];
    v.group = SmemOperand::Make(smem.v + group * kGroupRows * 64);
    MatmulABt<DoTile>(dp_frag, v, SmemOperand::Make(do_smem), nullptr);
    uint32_t p_frag[kN / 2][1][4], ds_frag[kN / 2][1][4];
    if (kChangesScores || kHasDropout) {
      PanelRule<false, 1> of_tile = RuleOfTile(smem, rule, stage, scale_exp);
      const int* firsts = smem.gathered[n % kSlots].first;
      RuledProbabilities(
          s_frag, p_frag, smem.lse_exp[stage], of_tile, RuleOf(smem).query_words[stage],
          [&](int n) { return FragmentColumn{firsts[n * 8 / kRun] + lane % 4 * 2, n * 8 % kRun}; },
          reach);
    } else {
      Probabilities(s_frag, scale_exp, smem.lse_exp[stage]);
    }
    if (is_masked) KeepAllowed(s_frag, smem.mask[stage]);
    if (kHasSoftcap) {
      if (is_masked) KeepAllowed(p_frag, smem.mask[stage]);
    }
    MatmulWait<0>(dp_frag);
    ScoreGradient(dp_frag, s_frag, smem.delta[stage]);
    if (is_masked) KeepAllowed(dp_frag, smem.mask[stage]);
    if (kSumsBias && reach != kIsWithin) {
      RuleOf(smem).beyond[reach == kIsAbove][threadIdx.x] += SumOfKeys(dp_frag, smem.keys_exist);
    }
    if (!kHasSoftcap) PackAllFragments(p_frag, s_frag);
    if (kHasDropout) DropBelowZero(p_frag);
    // This changes no result, but without it ptxas serializes the products (C7512): p is packed so early.
    if (kHasSoftcap && !kHasDropout) KeepKeys(p_frag, smem.keys_exist);
    PackAllFragments(ds_frag, dp_frag);
    if (kHasRule) KeepKeys(ds_frag, smem.keys_exist);

    BarrierSync(kDsLeft + group, kMathThreads);  // dq of the tile before does not read ds any more
    StoreDs(smem.ds, ds_frag, warp_row);
    WgmmaPB<DoTile>(dv_frag, p_frag, SmemOperand::Make(do_smem));
    FenceForWgmma();  // takes long: beside dv
    BarrierSync(kDsWritten, kMathThreads);
    float dq_frag[1][kDqN][4];
    WgmmaAtB<kTileKV>(
        dq_frag, SmemOperand::Make(smem.ds + (kSharesQueries ? group * DsTile::kPanel : 0)),
        SmemOperand::Make(smem.k_finite + (kSharesQueries ? 0 : group * KTile::kPanel)));
    WgmmaPB<QTile>(dk_frag, ds_frag, SmemOperand::Make(q_smem));
    MatmulWait<1>(dv_frag, dq_frag);
    if (!kSumsBias) BarrierArrive(kDsLeft + 1 - group, kMathThreads);

    queue_scores(n + 1 < tiles ? n + 1 : n, s_frag);  // of the last tile again: no branch here
    smem.dq_emptied[buffer].Wait(Parity<kDqBuffers>(n) ^ 1);
    StoreDq(smem.dq[buffer], dq_frag, group);
    FenceForWgmma();  // visible to the bulk copies too
    __syncwarp();
    if (lane == 0) smem.dq_filled[n % 2].Arrive();
    MatmulWait<1>(dk_frag);
    // Where the barrier lies takes no register from s.
    if (!kSumsBias) smem.released[Opaque(n) % kStages].Arrive();
    MatmulWait<0>(s_frag);
    if (kSumsBias) {
      if (reach == kIsWithin) strip.Add(smem, smem.gathered[n % kSlots]);
      smem.released[Opaque(n) % kStages].Arrive();
      BarrierArrive(kDsLeft + 1 - group, kMathThreads);
      if (n + 1 == strip.head_end) {
        strip.Finish(smem);
        strip.GoTo(n + 1);
      }
    }
  }

  // ---- epilogue ----

  // The other group has left k, v and k_finite, but for an s that nobody wants.
  BarrierSync(kDsLeft + group, kMathThreads);
  const float kept_times = kHasDropout ? rule.kept_times : 1;
#pragma unroll
  for (int i = 0; i < kOut * 4; ++i) {
    dk_frag[0][i / 4][i % 4] *= call.problem.softmax_scale * kept_times;
  }
#pragma unroll
  for (int i = 0; kHasDropout && i < kOutV * 4; ++i) dv_frag[0][i / 4][i % 4] *= kept_times;
  const auto row_of = [&](int r) { return owned.KeyRow(warp_row + r); };
  const auto zero_of = [&](int r) {
    return kHasRule ? !(smem.keys_exist[warp_row / 32] >> (warp_row % 32 + r) & 1)
                    : owned.KeyRowOfSequence(warp_row + r) < 0;
  };
  constexpr int kPitch = StorePitch(Max(kHeadDim, kHeadDimV));
  StoreRows<kHeadDim>(dk_frag, smem.k + warp_row * kPitch,
                      RowSpan::Make(call.dk, owned.batch, owned.kv_head), 0, row_of, zero_of);
  StoreRows<kHeadDimV>(dv_frag, smem.k + (kTileKV + warp_row) * kPitch,
                       RowSpan::Make(call.dv, owned.batch, owned.kv_head), 0, row_of, zero_of);
}

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    attention_bwd_sm90(const __grid_constant__ Given<SpattnCudaMappedBwdParams> given) {
  const SpattnCudaMappedBwdParams& mapped = CallOf(given);
  const SpattnCudaRule& rule = RuleOf(given);
  extern __shared__ __align__(1024) unsigned char smem_bytes[];
  Smem& smem = *reinterpret_cast<Smem*>(smem_bytes);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      smem.arrived[i].Init(1);
      smem.prepared[i].Init(kPrepareThreads);
      smem.released[i].Init(kMathThreads);
    }
#pragma unroll
    for (int i = 0; i < kSlots; ++i) smem.listed[i].Init(32);
    for (Mbarrier& filled : smem.dq_filled) filled.Init(kMathThreads / 32);
    for (Mbarrier& emptied : smem.dq_emptied) emptied.Init(32);
    FenceMbarrierInit();
    smem.number = atomicAdd(mapped.sums.started, 1);
  }
  __syncthreads();
  const Owned owned = Owned::Make(mapped, __shfl_sync(kFullWarp, smem.number, 0));
  if (kHasRule) FindKeys(smem, owned, rule);
  const int group = __shfl_sync(kFullWarp, threadIdx.x / kGroupThreads, 0);
  if (group == kGroups) {
    GiveRegisters<kCopyRegisters>();
    const int warp = threadIdx.x / 32 % 4;
    if (warp == 0) {
      Copy(smem, owned, rule);
    } else if (warp <= kAdders) {
      AddDq(smem, owned, warp - 1);
    } else {
      Prepare(smem, owned, rule);
    }
  } else {
    TakeRegisters<kMathRegisters>();
    Multiply(smem, owned, rule, group);
  }
}

}  // namespace spattn
