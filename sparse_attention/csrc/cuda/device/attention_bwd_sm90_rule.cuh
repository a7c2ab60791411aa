// attention_bwd_sm90_rule.cuh — what score rules need in attention_bwd_sm90.cu: who attends to whom,
// weights, and the gradient of relative_bias.
#pragma once
#include "cuda/device/attention_bwd_sm90.cuh"

namespace spattn {

// ---- who attends to whom ----

// Farther than any two rows are (host: CheckRuleLimits).
constexpr int kFar = 1 << 30;

// All threads find which of the tile's keys anyone may attend to, where there is a rule. The ds and the
// gradients of the others are 0, whatever their products are, and no tile needs a mask because of them.
DEVICE void FindKeys(Smem& smem, const Owned& owned, const SpattnCudaRule& rule) {
  const int r = threadIdx.x;
  if (r < kTileKV) {
    const int row = owned.KeyRowOfSequence(r);
    int segment = row < 0 ? -1 : 0;
    if (kHasSegments) {
      if (row >= 0) segment = KeySegment(rule, owned.mapped.call.problem, owned.batch, row);
      RuleOf(smem).key_segments[r] = segment;
    }
    const uint32_t word = __ballot_sync(kFullWarp, segment >= 0);
    RuleOf(smem).key_rows[r] = row;
    if (r % 32 == 0) smem.keys_exist[r / 32] = word;
    if (kHasBias) {
      int least = row < 0 ? kFar : row, greatest = row < 0 ? -kFar : row;
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        least = Min(least, __shfl_xor_sync(kFullWarp, least, lanes));
        greatest = Max(greatest, __shfl_xor_sync(kFullWarp, greatest, lanes));
      }
      if (r % 32 == 0) {
        RuleOf(smem).least_row[r / 32] = least, RuleOf(smem).greatest_row[r / 32] = greatest;
      }
    }
  }
  __syncthreads();
}

// Sets the bits of those of 32 keys whose segment is the query's. Takes a turn for each segment that the
// keys have, which are few. Called by whole warps.
DEVICE uint32_t KeysOfSegment(int query_segment, int key_segment) {
  uint32_t keys = 0, left = __ballot_sync(kFullWarp, key_segment >= 0);
#pragma unroll 1
  while (left != 0) {
    const int segment = __shfl_sync(kFullWarp, key_segment, __ffs(left) - 1);
    const uint32_t same = __ballot_sync(kFullWarp, key_segment == segment);
    if (query_segment == segment) keys = same;
    left &= ~same;
  }
  return keys;
}

// Clears the bits of a query's words that segments and mask do not allow, word by word, as registers are
// few. Called by whole warps.
DEVICE void Restricted(Smem& smem, const Owned& owned, const SpattnCudaRule& rule, int head,
                       uint4& words, int row, bool is_checked) {
  if (!__any_sync(kFullWarp, is_checked)) return;
  const SpattnProblem& problem = owned.mapped.call.problem;
#pragma unroll 1
  for (int w = 0; w < kMaskWords; ++w) {
    uint32_t word[1] = {kFullWarp};
    if (kHasMask) {
      Restrict<false, kPlanBlock>(rule, problem, owned.batch, head, [&](int r) {
        return RuleOf(smem).key_rows[w * 32 + r];
      }).Apply(word, row, is_checked);
    } else {
      const int segment = row < 0 ? -1 : QuerySegment(rule, problem, owned.batch, row);
      word[0] = KeysOfSegment(segment, RuleOf(smem).key_segments[w * 32 + threadIdx.x % 32]);
    }
    words.x &= w == 0 ? word[0] : kFullWarp;
    words.y &= w == 1 ? word[0] : kFullWarp;
    words.z &= w == 2 ? word[0] : kFullWarp;
    words.w &= w == 3 ? word[0] : kFullWarp;
  }
}

// Packed values of keys that nobody attends to become 0.
DEVICE void KeepKeys(uint32_t (&c)[kN / 2][1][4], const uint32_t* keys_exist) {
  const int key = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const uint32_t bits = keys_exist[key / 32] >> key % 32;
#pragma unroll
  for (int i = 0; i < kN * 2; ++i) {
    c[i / 4][0][i % 4] &= 0u - (bits >> (i % 2 * 8) & 1);
  }
}

// ---- weights ----

// The rule for a tile, of what Prepare has brought for it.
DEVICE PanelRule<false, 1> RuleOfTile(Smem& smem, const SpattnCudaRule& rule, int stage,
                                      float scale) {
  PanelRule<false, 1> of_tile{rule, RowMap{}};
  const int key = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  of_tile.scale = scale;
  if (kHasSoftcap) of_tile.cap = rule.logit_softcap * kExpScale;
  if (kHasAlibi) of_tile.slope = RuleOf(smem).slope[stage];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (kHasAlibi) {
      of_tile.rows_as_floats[0][h] = static_cast<float>(RuleOf(smem).key_rows[key + h * 8]);
    }
    if (kHasDropout) of_tile.multiplier[0][h] = RuleOf(smem).key_words[stage][key + h * 8];
    if (kHasBias) of_tile.rows[0][h] = RuleOf(smem).key_rows[key + h * 8];
  }
  if (kHasBias) of_tile.bias = RuleOf(smem).bias[stage];
  return of_tile;
}

// Products become p, whatever pairs are allowed. With a soft cap p is packed, and s becomes p times
// its slope. Where dropout does not keep a weight, both are less than 0.
template <typename ColumnOf>
DEVICE void RuledProbabilities(float (&s)[1][kN][4], uint32_t (&p_frag)[kN / 2][1][4],
                               const ColumnStats& lse_exp, PanelRule<false, 1>& rule,
                               const uint32_t* words, ColumnOf column_of, int reach) {
  const auto by_case = [&](auto work) {
    if constexpr (!kHasBias) {
      rule.ByCase(s, column_of, work);
    } else if (reach != kIsWithin) {
      work(Case<kEdgeInShift>{});
    } else {
      work(Case<kAnyFragment>{});
    }
  };
  by_case([&](auto the_case) {
#pragma unroll
    for (int n = 0; n < kN; n += 2) {
      const float4 lse = lse_exp.Read(n);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const ColumnPair columns = rule.Columns(column_of, words, n + i);
        float scores[1][4], cap_slopes[1][4], p[4];
        rule.Scores(the_case, s, n + i, columns, scores, cap_slopes);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const float shift = i == 0 ? (e % 2 == 0 ? lse.x : lse.y) : (e % 2 == 0 ? lse.z : lse.w);
          p[e] =
              Exp(kChangesScores ? scores[0][e] - shift : fmaf(scores[0][e], rule.scale, -shift));
          if (kHasDropout && !rule.Keeps(0, e / 2, columns, e % 2)) p[e] = -p[e];
          s[0][n + i][e] = kHasSoftcap ? p[e] * cap_slopes[0][e] : p[e];
        }
#pragma unroll
        for (int h = 0; kHasSoftcap && h < 2; ++h) {
          p_frag[n / 2][0][i * 2 + h] = PackPair(p[h * 2], p[h * 2 + 1]);
        }
      }
    }
  });
}

// Weights below 0, which dropout does not keep, become 0; NaN stays.
DEVICE void DropBelowZero(uint32_t (&p_frag)[kN / 2][1][4]) {
#pragma unroll
  for (int i = 0; i < kN * 2; ++i) {
    uint32_t& pair = p_frag[i / 4][0][i % 4];
    asm("max.NaN." SPATTN_PTX_TYPE "x2 %0, %0, %1;" : "+r"(pair) : "r"(0));
  }
}

// ---- the gradient of relative_bias ----

// What the distances of a passing tile are. Called by whole warps.
DEVICE TileReach ReachOf(Smem& smem, const SpattnCudaRule& rule, const Gathered& tile) {
  const RuleSmem& of_rule = RuleOf(smem);
  int least = kFar, greatest = -kFar;
#pragma unroll
  for (int w = 0; w < kMaskWords; ++w) {
    least = Min(least, of_rule.least_row[w]), greatest = Max(greatest, of_rule.greatest_row[w]);
  }
  const int lane = threadIdx.x % 32, first = lane < kGather ? tile.first[lane] : -1;
  const int edge = rule.bias_reach - 1, ahead = first + rule.q_offset;
  if (__all_sync(kFullWarp, first < 0 || ahead - greatest >= edge)) return kIsAbove;
  if (__all_sync(kFullWarp, first < 0 || ahead + kRun - 1 - least <= -edge)) return kIsBelow;
  return kIsWithin;
}

// The sum of this lane's ds of keys that anybody attends to.
DEVICE float SumOfKeys(const float (&ds)[1][kN][4], const uint32_t* keys_exist) {
  const int key = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4;
  const uint32_t bits = keys_exist[key / 32] >> key % 32;
  float sums[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kN * 4; ++i) sums[i / 2 % 2] += ds[0][i / 4][i % 4];
  return (bits & 1 ? sums[0] : 0) + (bits >> 8 & 1 ? sums[1] : 0);
}

// Adds up the gradient of relative_bias in strips of device memory, one for each kv tile of each head
// (bias_sums.cuh). A distance belongs to one thread, so that its sum has one order and no barriers: to that
// whose number is what its place in the strip leaves, divided by the threads.
struct BiasStrip {
  const Owned& owned;
  const SpattnCudaRule& rule;
  int head;
  unsigned head_end;  // the tile behind the head's

  // All multiplying threads call it and what follows.
  __forceinline__ void Init(Smem& smem) {
    for (head = owned.FirstHead(); head < owned.EndHead(); ++head) {
      float* sums = Sums(head);
      for (int i = threadIdx.x; i < 2 * rule.sum_reach - 1; i += kMathThreads) sums[i] = 0;
    }
    RuleOf(smem).beyond[0][threadIdx.x] = RuleOf(smem).beyond[1][threadIdx.x] = 0;
    head = owned.FirstHead(), head_end = KvList::Make(owned, head).Tiles();
    GoTo(0);
  }

  // [2 * sum_reach - 1]
  __forceinline__ float* Sums(int head) const {
    const int64_t slice =
        static_cast<int64_t>(owned.batch) * owned.mapped.call.by_kv.tiles + owned.tile;
    return rule.bias_sums + (slice * owned.mapped.call.problem.heads + head) *
                                (2 * static_cast<int64_t>(rule.sum_reach) - 1);
  }

  // Finds the head of tile n, which is the next one.
  __forceinline__ void GoTo(unsigned n) {
    while (n >= head_end && head + 1 < owned.EndHead()) {
      head_end += KvList::Make(owned, ++head).Tiles();
    }
  }

  // Adds a tile's ds, as it lies in shared memory.
  __forceinline__ void Add(Smem& smem, const Gathered& tile) const {
    const int zero = rule.sum_reach - 1, last = 2 * zero, thread = threadIdx.x;
    float* sums = Sums(head);
#pragma unroll 1
    for (int i = 0; i < kGather * kOwned; ++i) {
      const int run = i / kOwned, block = i % kOwned;
      const int first_query = tile.first[run],
                first_key = RuleOf(smem).key_rows[block * kPlanBlock];
      if (first_query < 0 || first_key < 0) continue;
      // The diagonal of this run and this block that is the thread's: column less row.
      const int first = first_query + rule.q_offset - first_key + zero;
      int diagonal = (thread - first) & (kMathThreads - 1);
      if (diagonal >= kRun) diagonal -= kMathThreads;
      if (diagonal <= -kPlanBlock) continue;
      float sum = 0;
#pragma unroll 4
      for (int column = Max(diagonal, 0); column < Min(kRun, kPlanBlock + diagonal); ++column) {
        const int query = run * kRun + column, key = block * kPlanBlock + column - diagonal;
        sum += ToFloat(smem.ds[DsTile::Offset(key, query) + query % 8]);
      }
      const int at = first + diagonal;
      if (at <= 0) {
        RuleOf(smem).beyond[0][thread] += sum;
      } else if (at >= last) {
        RuleOf(smem).beyond[1][thread] += sum;
      } else {
        sums[at] += sum;
      }
    }
  }

  // Ends a head: warps 0 and 1 add up what lies beyond the reach. With a reach of 1 both sides are one
  // distance, so warp 1 is behind warp 0.
  __forceinline__ void Finish(Smem& smem) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    BarrierSync(kMathBarrier, kMathThreads);
    float sum = 0;
    if (warp < 2) {
#pragma unroll
      for (int i = 0; i < kMathThreads / 32; ++i) sum += RuleOf(smem).beyond[warp][i * 32 + lane];
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kFullWarp, sum, lanes);
    }
    if (threadIdx.x == 0) Sums(head)[0] += sum;
    BarrierSync(kMathBarrier, kMathThreads);
    if (threadIdx.x == 32) Sums(head)[2 * rule.sum_reach - 2] += sum;
    RuleOf(smem).beyond[0][threadIdx.x] = RuleOf(smem).beyond[1][threadIdx.x] = 0;
  }
};

}  // namespace spattn
