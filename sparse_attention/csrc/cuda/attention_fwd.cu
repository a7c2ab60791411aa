// attention_fwd.cu — block-sparse attention, forward.
//
// Math, per batch b, head h, query row i (sums run over the allowed positions j only):
//   s_ij = softmax_scale * <q_i, k_j>     lse_i = log sum_j exp(s_ij)
//   o_i  = sum_j exp(s_ij - lse_i) * v_j  (no allowed j: o_i = 0, lse_i = -inf)
//
// Mapping: one CTA per (q tile, head, batch) = grid (x, y, z), a head's last q tiles first (causal
//          rows are heaviest there) and its tiles together, so that they share k and v in L2.
//          kWarps warps split the q rows.
// Tiles:   q_smem [kTileRows, head_dim]
//          k_smem, v_smem [kStages][kBlockKV, dim], keys gathered from kBlockKV / kPlanKV blocks
//          mask_smem [kStages][kBlockKV], words with a bit for each of the kTileRows
//          s_frag [rows of a warp, kSubKV] f32, registers
//          o_frag [rows of a warp, head_dim_v] f32, registers
// Stages:  load(n+1) | s = q kT | mask (where a block is PARTIAL or ends early) | online softmax
//          | o += p v
// Memory:  smem = (kTileRows * dim + kStages * kBlockKV * both dims) * sizeof(T) and padding (Smem)
// Cost:    4 * head_dim FLOP per computed pair;
//          HBM reads: q once, k and v once per q tile that lists them; writes: o, lse.
// Numerics: inputs T, accumulation f32, exp2 (float32: exp) with scale_exp so that one FFMA feeds
//          it; p is rounded to T before p v; lse in nats. Bitwise deterministic: a CTA owns its
//          rows, no atomics. A masked key cannot leak, NaN and Inf included: its score is replaced,
//          and non-finite v are taken out of masked tiles and given back to the rows that do attend
//          to them.
// After:   Child et al. 2019 (arXiv:1904.10509); Milakov & Gimelshein 2018 (arXiv:1805.02867);
//          Dao et al. 2022 (arXiv:2205.14135), Dao 2023 (arXiv:2307.08691).
// Measured: benchmarks/results/gpu_kernels_h100.txt
#include "matmul.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM, kHeadDimV = SPATTN_HEAD_DIM_V;
constexpr int kBlockQ = SPATTN_BLOCK_Q;    // queries of a plan tile
constexpr int kPlanKV = SPATTN_PLAN_KV;    // keys of a plan block
constexpr int kBlockKV = SPATTN_BLOCK_KV;  // keys of a streamed tile
constexpr int kSubKV = SPATTN_SUB_KV;      // of which scores are in registers at a time
constexpr int kWarps = SPATTN_WARPS, kThreads = kWarps * 32;
constexpr int kStages = SPATTN_STAGES;
constexpr int kTileRows = Max(kBlockQ, 16);
constexpr int kM = kTileRows / kWarps / 16, kWarpRows = kM * 16;
constexpr int kN = kSubKV / 8, kOut = PaddedDim(kHeadDimV) / 8;
static_assert(kM * 16 * kWarps == kTileRows && (kM == 1 || kM == 2), "a warp has 16 or 32 rows");
static_assert(kBlockKV % kSubKV == 0 && kSubKV % 32 == 0, "sub-tiles");
using List = BlockList<kBlockKV, kPlanKV>;
using QTile = Tile<kTileRows, kHeadDim>;
using KTile = Tile<kBlockKV, kHeadDim>;
using VTile = Tile<kBlockKV, kHeadDimV>;

struct Smem {
  static constexpr int kO =
      kTileRows * StorePitch(kHeadDimV) * sizeof(T);  // takes q's place at the end
  static constexpr int kQ = RoundUp(kHasWgmma ? QTile::kBytes : Max(QTile::kBytes, kO), kTileAlign);
  static constexpr int kMask = kBlockKV * MaskWords(kTileRows) * 4;
  static constexpr int kStage = RoundUp(KTile::kBytes + VTile::kBytes + kMask, kTileAlign);
  static constexpr int kScratch = ScratchBytes<kSubKV>();
  static constexpr int kBytes = Max(kQ + kStages * kStage + kWarps * kScratch, kO);
};
static_assert(Smem::kBytes == SPATTN_SHARED_MEMORY, "the host counts other bytes");

// ---- device helpers ----

struct Stage {
  T *k, *v;
  uint32_t* mask;
};

struct Warp {
  int index, lane;
  float* scratch;
};

// Scores of pairs that are not allowed become -inf, whatever they were.
DEVICE void ApplyMask(float (&s)[kM][kN][4], const uint32_t* mask_smem, int first_key) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t allowed = FragmentMask<kTileRows, kWarpRows>(mask_smem, first_key, n, j);
#pragma unroll
      for (int i = 0; i < kM * 2; ++i) {
        if (!(allowed >> (i * 8) & 1)) s[i / 2][n][i % 2 * 2 + j] = -kInf;
      }
    }
  }
}

// What exponents are shifted by. Rounded, and the same in all places: what the exponentials of a row
// were shifted by must cancel to the last bit where they meet.
DEVICE float Shift(float row_max, float scale_exp) { return __fmul_rn(row_max, scale_exp); }

// log(sum * exp(shift)). The float32 backward takes exp of it again and would double an error of one
// unit in the last place.
DEVICE float LogSumExp(float row_max, float scale, float sum) {
  if (kIsFloat) return static_cast<float>(Shift(row_max, scale) + log(double(sum)));
  return fmaf(row_max, scale, logf(sum));
}

struct OnlineSoftmax {
  float row_max[kM][2], row_sum[kM][2];  // of raw scores; this lane's share of the sum

  __forceinline__ void Init() {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      row_max[i / 2][i % 2] = -kInf;
      row_sum[i / 2][i % 2] = 0;
    }
  }

  // Turns scores into exp(s - row_max), rescales what came before.
  __forceinline__ void Update(float (&s)[kM][kN][4], float (&o)[kM][kOut][4], float scale_exp) {
    float corrections[kM][2];
    bool is_changed = false;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      // Two chains each for the maximum and the sum: half the latency.
      float peak = row_max[m][h], other_peak = s[m][0][h * 2 + 1];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        peak = fmaxf(peak, s[m][n][h * 2]);
        other_peak = fmaxf(other_peak, s[m][n][h * 2 + 1]);
      }
      peak = fmaxf(peak, other_peak);
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 2));
      const float shift = peak == -kInf ? 0 : Shift(peak, scale_exp);
      const float correction = Exp(Shift(row_max[m][h], scale_exp) - shift);
      row_max[m][h] = peak;
      float sums[2] = {row_sum[m][h] * correction, 0};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float p = Exp(fmaf(s[m][n][h * 2 + j], scale_exp, -shift));
          s[m][n][h * 2 + j] = p;
          sums[j] += p;
        }
      }
      row_sum[m][h] = sums[0] + sums[1];
      corrections[m][h] = correction;
      is_changed |= correction != 1;
    }
    // Once a row has seen many keys its maximum rarely moves.
    if (!__any_sync(kFullWarp, is_changed)) return;
#pragma unroll
    for (int i = 0; i < kM * kOut * 4; ++i) {
      o[i / (kOut * 4)][i / 4 % kOut][i % 4] *= corrections[i / (kOut * 4)][i % 4 / 2];
    }
  }

  // Divides o by the sums; returns lse of this lane's rows in nats.
  __forceinline__ void Finish(float (&o)[kM][kOut][4], float (&lse)[kM][2], float scale) {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float sum = row_sum[m][h];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      // One rounding, not two, for float32: delta = <do, o> cancels against dp in the backward.
      const float divisor = sum == 0 ? 1 : sum, inverse = 1 / divisor;
      lse[m][h] = sum == 0 ? -kInf : LogSumExp(row_max[m][h], scale, sum);
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
#pragma unroll
        for (int j = h * 2; j < h * 2 + 2; ++j) {
          o[m][n][j] = kIsFloat ? o[m][n][j] / divisor : o[m][n][j] * inverse;
        }
      }
    }
  }
};

// Gives the non-finite v that were zeroed in a PARTIAL tile to the rows that attend to them: with p
// > 0, p * Inf is Inf and p * NaN is NaN, so adding them once is enough. Rare, hence not fast.
template <typename KeyRow>
DEVICE void AddNonfinite(float (&o)[kM][kOut][4], const uint32_t* mask_smem, const RowSpan& v,
                         KeyRow key_row) {
#pragma unroll 1
  for (int key = 0; key < kBlockKV; ++key) {
    const int row = key_row(key);
    const int lane = threadIdx.x % 32;
    const uint32_t allowed = MaskWord<kTileRows, kWarpRows>(mask_smem, key) >> (lane / 4);
#pragma unroll
    for (int n = 0; n < kOut; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int column = n * 8 + lane % 4 * 2 + j;
        if (row < 0 || column >= kHeadDimV) continue;
        const float value = ToFloat(v.Row(row)[column]);
        if (fabsf(value) < kInf) continue;
#pragma unroll
        for (int i = 0; i < kM * 2; ++i) {
          if (allowed >> (i * 8) & 1) o[i / 2][n][i % 2 * 2 + j] += value;
        }
      }
    }
  }
}

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads, SPATTN_MIN_CTAS)
    attention_fwd(const __grid_constant__ SpattnCudaFwdParams params) {
  extern __shared__ __align__(128) unsigned char smem[];
  const SpattnProblem& problem = params.problem;
  const SpattnTilePlan& plan = params.by_q;

  const int tile = plan.tiles - 1 - static_cast<int>(blockIdx.x), head = blockIdx.y,
            batch = blockIdx.z;
  const int kv_head =
      problem.heads == problem.kv_heads ? head : head / (problem.heads / problem.kv_heads);
  const RowMap q_rows = RowMap::Make(problem.q_len, problem.row_stride, problem.q_len);
  const RowMap kv_rows =
      RowMap::Make(problem.kv_len, problem.row_stride,
                   problem.kv_lengths ? problem.kv_lengths[batch] : problem.kv_len);
  const RowSpan k = RowSpan::Make(params.k, batch, kv_head),
                v = RowSpan::Make(params.v, batch, kv_head);
  const List list = List::Make(plan, plan.heads == 1 ? 0 : head, tile);
  const Warp warp{static_cast<int>(threadIdx.x / 32), static_cast<int>(threadIdx.x % 32),
                  reinterpret_cast<float*>(smem + Smem::kQ + kStages * Smem::kStage +
                                           threadIdx.x / 32 * Smem::kScratch)};
  T* q_smem = reinterpret_cast<T*>(smem);
  const auto stage_of = [&](int buffer) {
    unsigned char* at = smem + Smem::kQ + buffer * Smem::kStage;
    return Stage{reinterpret_cast<T*>(at), reinterpret_cast<T*>(at + KTile::kBytes),
                 reinterpret_cast<uint32_t*>(at + KTile::kBytes + VTile::kBytes)};
  };
  const auto q_row = [&](int r) { return r < kBlockQ ? q_rows.Row(tile * kBlockQ + r) : -1; };
  const auto needs_mask = [&](const Blocks& blocks) {
    const int first = list.FirstPosition(blocks);
    return __any_sync(
        kFullWarp, warp.lane < List::kGather &&
                       (first < 0 || blocks.mask_id >= 0 || !kv_rows.AllExist(first, List::kRun)));
  };
  const auto load = [&](auto masked, int buffer, const Blocks& blocks) {
    constexpr bool kMasked = decltype(masked)::kValue;
    const Stage stage = stage_of(buffer);
    LoadRowPair<kBlockKV, kHeadDim, kHeadDimV, kThreads, !kMasked>(
        stage.k, k, stage.v, v, [&](int r) {
          return kMasked ? kv_rows.Row(list.Position(blocks, r))
                         : kv_rows.ExistingRow(list.ExistingPosition(blocks, r));
        });
    if (kMasked) LoadMask<kBlockQ, kThreads>(stage.mask, list, blocks, plan.mask_bits, kv_rows);
  };
  const auto zero_nonfinite = [&](int buffer) {
    return ZeroNonfiniteRows<kBlockKV, kHeadDimV, kThreads>(stage_of(buffer).v);
  };

  LoadRows<kTileRows, kHeadDim, kThreads, false>(q_smem, RowSpan::Make(params.q, batch, head),
                                                 q_row);
  RowOperand<kM, QTile, SPATTN_Q_IN_REGISTERS> q_operand;
  float o_frag[kM][kOut][4] = {};
  OnlineSoftmax softmax;
  softmax.Init();
#if SPATTN_SCALE_POSITIVE
  const float scale = problem.softmax_scale, first_scale = 1;
#else
  const float scale = 1,
              first_scale = problem.softmax_scale;  // the largest score is not the largest <q, k>
#endif

  const auto step = [&](auto masked, int n, int buffer, bool has_nonfinite) {
    const Stage stage = stage_of(buffer);
    if (n == 0) q_operand.Load(q_smem, warp.index * kWarpRows);
#pragma unroll 1
    for (int sub = 0; sub < kBlockKV; sub += kSubKV) {
      if (masked && !AnyAllowed<kTileRows, kWarpRows, kSubKV>(stage.mask, sub)) continue;
      float s_frag[kM][kN][4];
      MatmulABt<KTile>(s_frag, q_operand, stage.k + sub * KTile::kRowPitch, warp.scratch);
      MatmulWait<0>(s_frag);
      if (!SPATTN_SCALE_POSITIVE) {
#pragma unroll
        for (int i = 0; i < kM * kN * 4; ++i)
          s_frag[i / (kN * 4)][i / 4 % kN][i % 4] *= first_scale;
      }
      if (masked) ApplyMask(s_frag, stage.mask, sub);
      softmax.Update(s_frag, o_frag, scale * kExpScale);
      MatmulPB<VTile>(o_frag, s_frag, stage.v + sub * VTile::kRowPitch, warp.scratch);
      MatmulWait<0>(o_frag);
    }
    if (masked && has_nonfinite) {
      const Blocks blocks = list.Fetch(n);
      AddNonfinite(o_frag, stage.mask, v,
                   [&](int r) { return kv_rows.Row(list.Position(blocks, r)); });
    }
  };
  StreamTiles<kStages>(list, needs_mask, load, zero_nonfinite, step);

  // ---- epilogue ----

  float lse[kM][2];
  softmax.Finish(o_frag, lse, scale);
  const int warp_row = warp.index * kWarpRows;
  if (warp.lane % 4 == 0) {
    float* to = params.lse + (static_cast<int64_t>(batch) * problem.heads + head) * problem.q_len;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int row = q_row(warp_row + i * 8 + warp.lane / 4);
      if (row >= 0) to[row] = lse[i / 2][i % 2];
    }
  }
  StoreRows<kHeadDimV>(
      o_frag, q_smem + warp_row * StorePitch(kOut * 8), RowSpan::Make(params.o, batch, head), 0,
      [&](int r) { return q_row(warp_row + r); }, [](int) { return false; });
}

}  // namespace spattn
