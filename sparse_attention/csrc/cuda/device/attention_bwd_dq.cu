// attention_bwd_dq.cu — block-sparse attention, gradient of the queries.
//
// Math, per batch b, head h, query row i (sums run over the allowed positions j only):
//   p_ij = exp(softmax_scale * <q_i, k_j> - lse_i)     dp_ij = <do_i, v_j>
//   ds_ij = p_ij * (dp_ij - delta_i)                   dq_i = softmax_scale * sum_j ds_ij * k_j
//
// Mapping: as attention_fwd: one CTA per (q tile, head, batch), past which the tile's keys go.
// Tiles:   q_smem, do_smem [kTileRows, dim]
//          k_smem, v_smem [kStages][kTileKV, dim] and mask words
//          s_frag, dp_frag [rows of a warp, kSubKV] f32, registers
//          dq_frag [rows of a warp, head_dim] f32, registers
// Stages:  load(n+1) | s = q kT, dp = do vT | ds (0 where masked) | dq += ds k
// Memory:  smem = (kTileRows + kStages * kTileKV) * both dims * sizeof(T) and padding (Smem)
// Cost:    6 * head_dim FLOP per computed pair;
//          HBM reads: q, do once, k and v once per q tile that lists them; writes: dq.
// Numerics: as attention_fwd; ds is rounded to T before ds k. A CTA owns its rows: bitwise
//          deterministic, no atomics.
// Bias:    with SPATTN_BIAS_SUMS, one CTA per (slice, head), which takes tiles of all sequences in turn
//          and adds the gradient of relative_bias up (bias_sums.cuh).
// After:   Dao et al. 2022 (arXiv:2205.14135), appendix B.
// Measured: benchmarks/results/gpu_kernels_h100.txt
#include "cuda/device/bias_sums.cuh"
#include "cuda/device/matmul.cuh"
#include "cuda/device/pipeline.cuh"
#include "cuda/device/score_rule.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM, kHeadDimV = SPATTN_HEAD_DIM_V;
constexpr int kTileQ = SPATTN_TILE_Q;    // queries of a plan tile
constexpr int kPlanKV = SPATTN_PLAN_KV;  // keys of a plan block
constexpr int kTileKV = SPATTN_TILE_KV;  // keys of a passing tile
constexpr int kSubKV = SPATTN_SUB_KV;    // of which scores are in registers at a time
constexpr int kWarps = SPATTN_WARPS, kThreads = kWarps * 32;
constexpr int kStages = SPATTN_STAGES;
constexpr int kTileRows = Max(kTileQ, 16);
constexpr int kM = kTileRows / kWarps / 16, kWarpRows = kM * 16;
constexpr int kN = kSubKV / 8, kOut = PaddedDim(kHeadDim) / 8;
static_assert(kM * 16 * kWarps == kTileRows && (kM == 1 || kM == 2), "a warp has 16 or 32 rows");
static_assert(kTileKV % kSubKV == 0 && kSubKV % 32 == 0, "sub-tiles");
using List = BlockList<kTileKV, kPlanKV>;
using QTile = Tile<kTileRows, kHeadDim>;
using DoTile = Tile<kTileRows, kHeadDimV>;
using KTile = Tile<kTileKV, kHeadDim>;
using VTile = Tile<kTileKV, kHeadDimV>;

struct Smem {
  static constexpr int kRows = RoundUp(QTile::kBytes + DoTile::kBytes, kTileAlign);
  static constexpr int kMask = kTileKV * MaskWords(kTileRows) * 4;
  static constexpr int kWords = kTileKV * PanelRule<true, kM>::kWords * 4;
  static constexpr int kStage = RoundUp(KTile::kBytes + VTile::kBytes + kMask + kWords, kTileAlign);
  static constexpr int kScratch = ScratchBytes<kSubKV>();
  static constexpr int kSums = BiasSums<kTileRows, kSubKV, List::kRun>::kBytes;
  static constexpr int kBytes = kRows + kStages * kStage + kWarps * kScratch + kSums;
  static_assert(kTileRows * StorePitch(kHeadDim) * static_cast<int>(sizeof(T)) <= kBytes,
                "dq leaves through it");
};
static_assert(Smem::kBytes == SPATTN_SHARED_MEMORY, "the host counts other bytes");

// ---- device helpers ----

struct Stage {
  T *k, *v;
  uint32_t *mask, *words;  // words: of the keys, for dropout
};

struct RowStats {
  float lse_exp[kM][2], delta[kM][2];  // of this lane's rows
};

// dp becomes ds. Where a pair is not allowed ds is 0, whatever s and dp were. With dropout ds comes out
// without the factor kept_times, which dq gets at the end, and delta is given without it.
template <bool kMasked, typename ColumnOf, typename Sums>
DEVICE void ScoreGradient(float (&dp)[kM][kN][4], const float (&s)[kM][kN][4], const RowStats& rows,
                          float scale_exp, const uint32_t* mask_smem, int first_key,
                          PanelRule<true, kM>& rule, const uint32_t* words, ColumnOf column_of,
                          Sums& sums) {
  rule.ByCase(s, column_of, [&](auto the_case) {
    sums.Begin(the_case);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const ColumnPair columns = rule.Columns(column_of, words, n);
      float scores[kM][4], cap_slopes[kM][4];
      rule.Scores(the_case, s, n, columns, scores, cap_slopes);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t allowed =
            kMasked ? FragmentMask<kTileRows, kWarpRows>(mask_smem, first_key, n, j) : kFullWarp;
#pragma unroll
        for (int i = 0; i < kM * 2; ++i) {
          const int m = i / 2, h = i % 2;
          const bool is_allowed = allowed >> (i * 8) & 1;
          const float p =
              Exp(kChangesScores ? scores[m][h * 2 + j] - rows.lse_exp[m][h]
                                 : fmaf(scores[m][h * 2 + j], scale_exp, -rows.lse_exp[m][h]));
          float& at = dp[m][n][h * 2 + j];
          float ds = p * (at - rows.delta[m][h]);
          if (kHasDropout) {
            const float weight = rule.Keeps(m, h, columns, j) ? p : 0;
            ds = fmaf(weight, at, -p * rows.delta[m][h]);
          }
          at = is_allowed ? ds : 0;
          if (kSumsBias) {
            // Nothing may come by a row that is not there, NaN of k and v neither.
            if (rows.lse_exp[m][h] == kInf) at = 0;
            sums.template Put<kWarpRows>(the_case, at, rule.Distance(m, h, columns, j), m, h, n, j);
          }
          if (kHasSoftcap) at = is_allowed ? at * cap_slopes[m][h * 2 + j] : 0;
        }
      }
    }
  });
}

// ---- one tile ----

using Sums = BiasSums<kTileRows, kSubKV, List::kRun>;

DEVICE void PassTile(unsigned char* smem, const SpattnCudaBwdParams& params,
                     const SpattnCudaRule& rule, int tile, int head, int batch, Sums& sums) {
  const SpattnProblem& problem = params.problem;
  const SpattnTilePlan& plan = params.by_q;
  const int kv_head =
      problem.heads == problem.kv_heads ? head : head / (problem.heads / problem.kv_heads);
  const RowMap q_rows = RowMap::Make(problem.q_len, problem.row_stride, problem.q_len);
  const RowMap kv_rows =
      RowMap::Make(problem.kv_len, problem.row_stride,
                   problem.kv_lengths ? problem.kv_lengths[batch] : problem.kv_len);
  const RowSpan k = RowSpan::Make(params.k, batch, kv_head),
                v = RowSpan::Make(params.v, batch, kv_head);
  const List list = List::MakeLeft(plan, plan.heads == 1 ? 0 : head, tile, batch, rule.q_tile_ends);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp * kWarpRows;
  T* q_smem = reinterpret_cast<T*>(smem);
  T* do_smem = reinterpret_cast<T*>(smem + QTile::kBytes);
  float* scratch =
      reinterpret_cast<float*>(smem + Smem::kRows + kStages * Smem::kStage + warp * Smem::kScratch);
  const auto stage_of = [&](int buffer) {
    unsigned char* at = smem + Smem::kRows + buffer * Smem::kStage;
    return Stage{reinterpret_cast<T*>(at), reinterpret_cast<T*>(at + KTile::kBytes),
                 reinterpret_cast<uint32_t*>(at + KTile::kBytes + VTile::kBytes),
                 reinterpret_cast<uint32_t*>(at + KTile::kBytes + VTile::kBytes + Smem::kMask)};
  };
  const auto q_row = [&](int r) { return r < kTileQ ? q_rows.Row(tile * kTileQ + r) : -1; };
  const auto needs_mask = [&](const Blocks& blocks) {
    const int first = list.FirstPosition(blocks);
    return __any_sync(kFullWarp, lane < List::kGather && (first < 0 || blocks.IsPartial() ||
                                                          !kv_rows.AllExist(first, List::kRun)));
  };
  const auto restriction = Restrict<true, List::kRun>(rule, problem, batch, head, q_row);
  const auto load = [&](auto masked, int buffer, const Blocks& blocks) {
    constexpr bool kMasked = decltype(masked)::kValue;
    const Stage stage = stage_of(buffer);
    LoadRowPair<kTileKV, kHeadDim, kHeadDimV, kThreads, !kMasked>(
        stage.k, k, stage.v, v, [&](int r) {
          return kMasked ? kv_rows.Row(list.Position(blocks, r))
                         : kv_rows.ExistingRow(list.ExistingPosition(blocks, r));
        });
    if (kHasDropout) {
      LoadKeyWords<kTileKV, kThreads>(stage.words, rule, problem, batch, head,
                                      [&](int r) { return kv_rows.Row(list.Position(blocks, r)); });
    }
    if (kMasked) {
      LoadMask<kTileQ, kThreads>(stage.mask, list, blocks, plan.mask_bits, kv_rows, restriction);
    }
  };
  // A masked key's NaN must not meet its ds = 0. A row that does attend to it has lse, hence ds,
  // NaN anyway.
  const auto zero_nonfinite = [&](int buffer) {
    ZeroNonfiniteRows<kTileKV, kHeadDim, kThreads>(stage_of(buffer).k);
    return false;
  };

  LoadRowPair<kTileRows, kHeadDim, kHeadDimV, kThreads, false>(
      q_smem, RowSpan::Make(params.q, batch, head), do_smem,
      RowSpan::Make(params.dout, batch, head), q_row);
  RowStats rows;
  const float kept_times = kHasDropout ? rule.kept_times : 1;
  const int64_t stats_at = (static_cast<int64_t>(batch) * problem.heads + head) * problem.q_len;
#pragma unroll
  for (int i = 0; i < kM * 2; ++i) {
    const int row = q_row(warp_row + i * 8 + lane / 4);
    rows.lse_exp[i / 2][i % 2] = row >= 0 ? params.lse_exp[stats_at + row] : kInf;
    rows.delta[i / 2][i % 2] = row >= 0 ? params.delta[stats_at + row] / kept_times : 0;
  }

  RowOperand<kM, QTile, SPATTN_Q_IN_REGISTERS> q_operand;
  RowOperand<kM, DoTile, SPATTN_Q_IN_REGISTERS> do_operand;
  float dq_frag[kM][kOut][4] = {};
  const float scale_exp = problem.softmax_scale * kExpScale;
  PanelRule<true, kM> panel_rule{rule, kv_rows};
  panel_rule.Init(problem, batch, head,
                  [&](int m, int h) { return q_row(warp_row + m * 16 + h * 8 + lane / 4); });
  const auto step = [&](auto masked, int n, int buffer, bool, auto prefetch) {
    constexpr bool kMasked = decltype(masked)::kValue;
    const Stage stage = stage_of(buffer);
    const Blocks blocks = kLooksAtDistances ? list.Fetch(n) : Blocks{};
    if (n == 0) {
      q_operand.Load(q_smem, warp_row);
      do_operand.Load(do_smem, warp_row);
    }
#pragma unroll 1
    for (int sub = 0; sub < kTileKV; sub += kSubKV) {
      if (kMasked && !kSumsBias && !AnyAllowed<kTileRows, kWarpRows, kSubKV>(stage.mask, sub))
        continue;
      q_operand.Locate(q_smem);
      do_operand.Locate(do_smem);
      const T *k_sub = stage.k + sub * KTile::kRowPitch, *v_sub = stage.v + sub * VTile::kRowPitch;
      float s_frag[kM][kN][4], dp_frag[kM][kN][4];
      MatmulABt<KTile>(s_frag, q_operand, SmemOperand::Make(k_sub), scratch);
      if (sub == 0) prefetch();
      MatmulABt<VTile>(dp_frag, do_operand, SmemOperand::Make(v_sub), scratch);
      MatmulWait<1>(s_frag);
      MatmulWait<0>(dp_frag);
      ScoreGradient<kMasked>(
          dp_frag, s_frag, rows, scale_exp, stage.mask, sub, panel_rule, stage.words + sub,
          [&](int n) { return list.Column(blocks, sub + n * 8); }, sums);
      if (kSumsBias) {
        sums.template Add<kThreads, kWarpRows>(
            q_rows, tile * kTileQ, rule.q_offset, kv_rows,
            [&](int column) { return list.Position(blocks, sub + column); });
      }
      MatmulPB<KTile>(dq_frag, dp_frag, SmemOperand::Make(k_sub), scratch);
      MatmulWait<0>(dq_frag);
    }
  };
  PassTiles<kStages, SPATTN_MIN_CTAS>(list, needs_mask, load, zero_nonfinite, step);

  // ---- epilogue ----

#pragma unroll
  for (int i = 0; i < kM * kOut * 4; ++i)
    dq_frag[i / (kOut * 4)][i / 4 % kOut][i % 4] *= problem.softmax_scale * kept_times;
  if (kSumsBias && params.dq.data == nullptr) return;
  StoreRows<kHeadDim>(
      dq_frag, q_smem + warp_row * StorePitch(kOut * 8), RowSpan::Make(params.dq, batch, head), 0,
      [&](int r) { return q_row(warp_row + r); }, [](int) { return false; });
}

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads, SPATTN_MIN_CTAS)
    attention_bwd_dq(const __grid_constant__ Given<SpattnCudaBwdParams> given) {
  extern __shared__ __align__(128) unsigned char smem[];
  const SpattnCudaBwdParams& params = CallOf(given);
  const SpattnCudaRule& rule = RuleOf(given);
  const int head = blockIdx.y;
  Sums sums;
  if constexpr (kSumsBias) {
    const int batch = static_cast<int>(params.problem.batch);
    const int tiles =
        CeilDiv(RowMap::Make(params.problem.q_len, params.problem.row_stride, params.problem.q_len)
                    .positions,
                kTileQ);
    sums.Init<kThreads>(smem + Smem::kBytes - Smem::kSums, rule, params.problem.heads, head);
#pragma unroll 1
    for (int64_t i = blockIdx.x; i < static_cast<int64_t>(tiles) * batch; i += gridDim.x) {
      PassTile(smem, params, rule, tiles - 1 - static_cast<int>(i / batch), head,
               static_cast<int>(i % batch), sums);
      __syncthreads();  // dq has left through shared memory
    }
    sums.Finish<kThreads>();
  } else {
    // A plan may have tiles that no query is in; the grid has not.
    PassTile(smem, params, rule, static_cast<int>(gridDim.x - 1 - blockIdx.x), head, blockIdx.z,
             sums);
  }
}

}  // namespace spattn
