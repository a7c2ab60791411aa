// attention_bwd_dkv.cu — block-sparse attention, gradients of the keys and values.
//
// Math, per batch b, kv head g, key row j (sums run over g's heads and the queries i that may
// attend to j), p_ij and ds_ij as in attention_bwd_dq.cu:
//   dv_j = sum_i p_ij * do_i            dk_j = softmax_scale * sum_i ds_ij * q_i
//
// Mapping: one CTA per (kv tile and split, kv head, batch) = grid (x, y, z), past which the
//          queries of the tile's list go, for every head of the group. The tile's kv blocks need not be
//          neighbours (params.h). Everything is held transposed, keys as rows, so that p and ds go
//          from accumulator to operand within registers. Wide heads share the columns of dk and dv
//          among kSplits CTAs, which repeat the scores.
// Tiles:   k_smem, v_smem [kTileKV, dim]
//          q_smem, do_smem [kStages][kTileQ, dim], lse_exp, delta and mask words beside them
//          s_frag, dp_frag [keys of a warp, kSubQ] f32, registers
//          dk_frag, dv_frag [keys of a warp, dim] f32, registers
// Stages:  load(n+1) | s = k qT, dp = v doT | p (0 where masked) | dv += p do | ds | dk += ds q
// Memory:  smem = (kTileKV + kStages * kTileQ) * both dims * sizeof(T) and padding (Smem)
// Cost:    8 * head_dim FLOP per computed pair;
//          HBM reads: k, v once, q and do once per kv tile that lists them; writes: dk, dv.
// Numerics: as attention_fwd; p and ds are rounded to T before their second product. The heads of a
//          group and the list are walked in order by the one CTA that owns the rows: bitwise
//          deterministic, no atomics.
// Rules:   score_rule.cuh; p before dv, and what ds is made of (Probabilities).
// After:   Dao et al. 2022 (arXiv:2205.14135), appendix B.
// Measured: benchmarks/results/gpu_kernels_h100.txt
#include "cuda/device/matmul.cuh"
#include "cuda/device/pipeline.cuh"
#include "cuda/device/score_rule.cuh"

namespace spattn {

// ---- config ----

constexpr int kHeadDim = SPATTN_HEAD_DIM, kHeadDimV = SPATTN_HEAD_DIM_V;
constexpr int kTileKV = SPATTN_TILE_KV;  // keys of a plan tile
constexpr int kPlanBlock =
    SPATTN_PLAN_BLOCK;                 // block_size: keys of an owned, queries of a passing block
constexpr int kTileQ = SPATTN_TILE_Q;  // queries of a passing tile
constexpr int kSubQ = SPATTN_SUB_Q;    // of which scores are in registers at a time
constexpr int kWarps = SPATTN_WARPS, kThreads = kWarps * 32;
constexpr int kStages = SPATTN_STAGES;
constexpr int kSplits = SPATTN_SPLITS;
constexpr int kOwned = Max(kTileKV / kPlanBlock, 1);  // blocks of a tile
constexpr int kM = kTileKV / kWarps / 16, kWarpRows = kM * 16;
constexpr int kN = kSubQ / 8;
constexpr int kOutK =
    PaddedDim(CeilDiv(PaddedDim(kHeadDim), kSplits)) / 8;  // n8 columns of a split
constexpr int kOutV = PaddedDim(CeilDiv(PaddedDim(kHeadDimV), kSplits)) / 8;
static_assert(kM * 16 * kWarps == kTileKV && (kM == 1 || kM == 2), "a warp has 16 or 32 rows");
static_assert(kTileKV % kPlanBlock == 0, "a tile is whole blocks");
static_assert(kTileQ % kSubQ == 0 && kSubQ % 32 == 0, "sub-tiles");
static_assert(!kHasWgmma || (kOutK % 8 == 0 && kOutV % 8 == 0), "a split is whole panels");
using List = BlockList<kTileQ, kPlanBlock>;
using KTile = Tile<kTileKV, kHeadDim>;
using VTile = Tile<kTileKV, kHeadDimV>;
using QTile = Tile<kTileQ, kHeadDim>;
using DoTile = Tile<kTileQ, kHeadDimV>;

struct Smem {
  static constexpr int kRows = RoundUp(KTile::kBytes + VTile::kBytes, kTileAlign);
  static constexpr int kRow = kTileQ * 4;  // one float for each query
  static constexpr int kMask = kTileQ * MaskWords(kTileKV) * 4;
  static constexpr int kWords = kTileQ * PanelRule<false, kM>::kWords * 4;
  static constexpr int kStage =
      RoundUp(QTile::kBytes + DoTile::kBytes + 2 * kRow + kMask + kWords, kTileAlign);
  static constexpr int kScratch = ScratchBytes<kSubQ>();
  static constexpr int kBytes = kRows + kStages * kStage + kWarps * kScratch;
  static constexpr int kDk =
      kTileKV * StorePitch(kOutK * 8) * sizeof(T);  // where dk leaves; dv behind it
  static constexpr int kDv = kTileKV * StorePitch(kOutV * 8) * sizeof(T);
  static_assert(kDk + kDv <= kBytes, "dk and dv leave through it");
};
static_assert(Smem::kBytes == SPATTN_SHARED_MEMORY, "the host counts other bytes");

// ---- device helpers ----

struct Stage {
  T *q, *dout;
  float *lse_exp, *delta;
  uint32_t *mask, *words;  // words: of the queries, for dropout
};

// Whether what multiplies do is not what ds is made of.
constexpr bool kRemakesWeights = kHasSoftcap || kHasDropout;

// What a lane needs of the queries of a sub-tile, a number for each of its columns.
struct ColumnStats {
  float2 at[kN];

  DEVICE ColumnStats Read(const float* stats, int first_query) {
    ColumnStats columns;
    const float* from = stats + first_query + threadIdx.x % 4 * 2;
#pragma unroll
    for (int n = 0; n < kN; ++n) columns.at[n] = *reinterpret_cast<const float2*>(from + n * 8);
    return columns;
  }
  __forceinline__ float Of(int n, int j) const { return j == 0 ? at[n].x : at[n].y; }
};

// s becomes p. Where a pair is not allowed p is 0, whatever s was.
//
// With a rule, `weights` are what multiplies do, and s becomes what ds is made of: p times the slope of
// the soft cap, less than 0 where dropout does not keep the weight.
template <bool kMasked, typename ColumnOf>
DEVICE void Probabilities(float (&s)[kM][kN][4], float (&weights)[kM][kN][4], float scale_exp,
                          const ColumnStats& lse_exp, const uint32_t* mask_smem, int first_query,
                          PanelRule<false, kM>& rule, const uint32_t* words, ColumnOf column_of) {
  rule.ByCase(s, column_of, [&](auto the_case) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const ColumnPair columns = rule.Columns(column_of, words, n);
      float scores[kM][4], cap_slopes[kM][4];
      rule.Scores(the_case, s, n, columns, scores, cap_slopes);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const uint32_t allowed =
            kMasked ? FragmentMask<kTileKV, kWarpRows>(mask_smem, first_query, n, j) : kFullWarp;
#pragma unroll
        for (int i = 0; i < kM * 2; ++i) {
          const int m = i / 2, h = i % 2;
          const bool is_allowed = allowed >> (i * 8) & 1;
          float& at = s[m][n][h * 2 + j];
          at = is_allowed ? Exp(kChangesScores ? scores[m][h * 2 + j] - lse_exp.Of(n, j)
                                               : fmaf(at, scale_exp, -lse_exp.Of(n, j)))
                          : 0;
          if (!kRemakesWeights) continue;
          float& weight = weights[m][n][h * 2 + j];
          weight = at;
          if (kHasSoftcap) at = is_allowed ? at * cap_slopes[m][h * 2 + j] : 0;
          if (kHasDropout && !rule.Keeps(m, h, columns, j)) {
            weight = at * 0, at = -at;  // NaN stays
          }
        }
      }
    }
  });
}

// dp becomes ds = p * (dp - delta), 0 where a pair is not allowed. With dropout ds comes out without
// the factor kept_times, which dk gets at the end, and delta is given without it.
template <bool kMasked>
DEVICE void ScoreGradient(float (&dp)[kM][kN][4], const float (&p)[kM][kN][4],
                          const ColumnStats& delta, const uint32_t* mask_smem, int first_query,
                          float delta_times) {
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const uint32_t allowed =
          kMasked ? FragmentMask<kTileKV, kWarpRows>(mask_smem, first_query, n, j) : kFullWarp;
#pragma unroll
      for (int i = 0; i < kM * 2; ++i) {
        float& at = dp[i / 2][n][i % 2 * 2 + j];
        const float p_at = p[i / 2][n][i % 2 * 2 + j];
        const float ds =
            kHasDropout ? fmaf(fmaxf(p_at, 0), at, -fabsf(p_at) * (delta.Of(n, j) * delta_times))
                        : p_at * (at - delta.Of(n, j));
        at = allowed >> (i * 8) & 1 ? ds : 0;
      }
    }
  }
}

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads, SPATTN_MIN_CTAS)
    attention_bwd_dkv(const __grid_constant__ Given<SpattnCudaBwdParams> given) {
  extern __shared__ __align__(128) unsigned char smem[];
  const SpattnCudaBwdParams& params = CallOf(given);
  const SpattnCudaRule& rule = RuleOf(given);
  const SpattnProblem& problem = params.problem;
  const SpattnTilePlan& plan = params.by_kv;

  const int split = blockIdx.x % kSplits, tile = blockIdx.x / kSplits, kv_head = blockIdx.y,
            batch = blockIdx.z;
  const int group = problem.heads / problem.kv_heads;
  const RowMap q_rows = RowMap::Make(problem.q_len, problem.row_stride, problem.q_len);
  const RowMap kv_rows = RowMap::Make(problem.kv_len, problem.row_stride, problem.kv_len);
  const int first_owned = ((plan.heads == 1 ? 0 : kv_head) * plan.tiles + tile) * kOwned;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warp_row = warp * kWarpRows;
  T* k_smem = reinterpret_cast<T*>(smem);
  T* v_smem = reinterpret_cast<T*>(smem + KTile::kBytes);
  float* scratch =
      reinterpret_cast<float*>(smem + Smem::kRows + kStages * Smem::kStage + warp * Smem::kScratch);
  const auto stage_of = [&](int buffer) {
    unsigned char* at = smem + Smem::kRows + buffer * Smem::kStage;
    float* stats = reinterpret_cast<float*>(at + QTile::kBytes + DoTile::kBytes);
    uint32_t* mask = reinterpret_cast<uint32_t*>(stats + 2 * kTileQ);
    return Stage{reinterpret_cast<T*>(at),
                 reinterpret_cast<T*>(at + QTile::kBytes),
                 stats,
                 stats + kTileQ,
                 mask,
                 mask + Smem::kMask / 4};
  };
  const auto key_row = [&](int r) {
    const int block = __ldg(plan.tile_blocks + first_owned + r / kPlanBlock);
    const bool valid = block >= 0 && block <= kv_rows.positions / kPlanBlock;
    return valid ? kv_rows.Row(block * kPlanBlock + r % kPlanBlock) : -1;
  };

  LoadRowPair<kTileKV, kHeadDim, kHeadDimV, kThreads, false>(
      k_smem, RowSpan::Make(params.k, batch, kv_head), v_smem,
      RowSpan::Make(params.v, batch, kv_head), key_row);
  RowOperand<kM, KTile, SPATTN_KV_IN_REGISTERS> k_operand;
  RowOperand<kM, VTile, SPATTN_KV_IN_REGISTERS> v_operand;
  float dk_frag[kM][kOutK][4] = {}, dv_frag[kM][kOutV][4] = {};
  // The last split ends with the row; where the columns do not divide, two write the same to some.
  const int first_k = Min(split * kOutK * 8, PaddedDim(kHeadDim) - kOutK * 8);
  const int first_v = Min(split * kOutV * 8, PaddedDim(kHeadDimV) - kOutV * 8);
  const float scale_exp = problem.softmax_scale * kExpScale;
  const float kept_times = kHasDropout ? rule.kept_times : 1, delta_times = 1 / kept_times;

#pragma unroll 1
  for (int head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    const List list =
        List::MakeLeft(plan, plan.heads == 1 ? 0 : head, tile, batch, rule.kv_tile_ends);
    const RowSpan q = RowSpan::Make(params.q, batch, head),
                  dout = RowSpan::Make(params.dout, batch, head);
    const int64_t stats_at = (static_cast<int64_t>(batch) * problem.heads + head) * problem.q_len;
    // Keys that do not exist gather what nobody reads.
    const auto needs_mask = [&](const Blocks& blocks) {
      const int first = list.FirstPosition(blocks);
      return __any_sync(kFullWarp, lane < List::kGather && (first < 0 || blocks.IsPartial() ||
                                                            !q_rows.AllExist(first, List::kRun)));
    };
    const auto restriction = Restrict<false, kPlanBlock>(rule, problem, batch, head, key_row);
    const auto load = [&](auto masked, int buffer, const Blocks& blocks) {
      constexpr bool kMasked = decltype(masked)::kValue;
      const Stage stage = stage_of(buffer);
      const auto row_of = [&](int r) {
        return kMasked ? q_rows.Row(list.Position(blocks, r))
                       : q_rows.ExistingRow(list.ExistingPosition(blocks, r));
      };
      LoadRowPair<kTileQ, kHeadDim, kHeadDimV, kThreads, !kMasked>(stage.q, q, stage.dout, dout,
                                                                   row_of);
      const unsigned thread = Opaque(threadIdx.x);
#pragma unroll
      for (int i = 0; i < CeilDiv(kTileQ, kThreads); ++i) {
        const unsigned r = thread + i * kThreads;
        if (r >= kTileQ) break;  // whole warps
        const int row = row_of(r);
        CopyAsync<4>(stage.lse_exp + r, params.lse_exp + stats_at + Max(row, 0), row >= 0);
        CopyAsync<4>(stage.delta + r, params.delta + stats_at + Max(row, 0), row >= 0);
        if (kHasDropout) {
          const uint32_t* words = QueryWords(rule, problem, batch, head);
          CopyAsync<8>(stage.words + r * 2, words + Max(row, 0) * 2, row >= 0);
        }
      }
      if (kMasked) {
        LoadMask<kTileKV, kThreads>(stage.mask, list, blocks, plan.mask_bits, q_rows, restriction);
      }
    };
    // A masked query's NaN must not meet its p = 0 or ds = 0. A key that may be paired with it has NaN
    // from its lse_exp.
    const auto zero_nonfinite = [&](int buffer) {
      const Stage stage = stage_of(buffer);
      ZeroNonfiniteRows<kTileQ, kHeadDim, kThreads>(stage.q);
      ZeroNonfiniteRows<kTileQ, kHeadDimV, kThreads>(stage.dout);
      return false;
    };
    PanelRule<false, kM> panel_rule{rule, q_rows};
    panel_rule.Init(problem, batch, head, [&](int m, int h) {
      return kLooksAtDistances || kHasDropout ? key_row(warp_row + m * 16 + h * 8 + lane / 4) : 0;
    });
    const auto step = [&](auto masked, int n, int buffer, bool, auto prefetch) {
      constexpr bool kMasked = decltype(masked)::kValue;
      const Stage stage = stage_of(buffer);
      const Blocks blocks = kLooksAtDistances ? list.Fetch(n) : Blocks{};
      if (n == 0) {
        k_operand.Load(k_smem, warp_row);
        v_operand.Load(v_smem, warp_row);
      }
      // With wgmma the next sub-tile's products are queued behind those for dv and dk.
      constexpr bool kQueues = kHasWgmma && !kMasked;
#pragma unroll(kQueues ? kTileQ / kSubQ : 1)
      for (int sub = 0; sub < kTileQ; sub += kSubQ) {
        if (kMasked && !AnyAllowed<kTileKV, kWarpRows, kSubQ>(stage.mask, sub)) continue;
        k_operand.Locate(k_smem);
        v_operand.Locate(v_smem);
        const T *q_sub = stage.q + sub * QTile::kRowPitch,
                *do_sub = stage.dout + sub * DoTile::kRowPitch;
        float s_frag[kM][kN][4], dp_frag[kM][kN][4];
        MatmulABt<QTile>(s_frag, k_operand, SmemOperand::Make(q_sub), scratch);
        // With wgmma both are under way at once; else dp would only hold registers.
        if (kHasWgmma) MatmulABt<DoTile>(dp_frag, v_operand, SmemOperand::Make(do_sub), scratch);
        if (sub == 0) prefetch();
        const auto lse_exp = ColumnStats::Read(stage.lse_exp, sub);
        MatmulWait<1>(s_frag);
        float weights_frag[kM][kN][4];
        Probabilities<kMasked>(s_frag, weights_frag, scale_exp, lse_exp, stage.mask, sub,
                               panel_rule, stage.words + sub * 2,
                               [&](int n) { return list.Column(blocks, sub + n * 8); });
        const auto delta = ColumnStats::Read(stage.delta, sub);
        MatmulWait<0>(dp_frag);
        MatmulPB<DoTile>(dv_frag, kRemakesWeights ? weights_frag : s_frag,
                         SmemOperand::Make(do_sub + DoTile::Offset(0, first_v)), scratch);
        if (!kHasWgmma) MatmulABt<DoTile>(dp_frag, v_operand, SmemOperand::Make(do_sub), scratch);
        ScoreGradient<kMasked>(dp_frag, s_frag, delta, stage.mask, sub, delta_times);
        MatmulPB<QTile>(dk_frag, dp_frag, SmemOperand::Make(q_sub + QTile::Offset(0, first_k)),
                        scratch);
        if (!kQueues) MatmulWait<0>(dv_frag, dk_frag);
      }
      MatmulWait<0>(dv_frag, dk_frag);
    };
    PassTiles<kStages, SPATTN_MIN_CTAS>(list, needs_mask, load, zero_nonfinite, step);
  }

  // ---- epilogue ----

#pragma unroll
  for (int i = 0; i < kM * kOutK * 4; ++i)
    dk_frag[i / (kOutK * 4)][i / 4 % kOutK][i % 4] *= problem.softmax_scale * kept_times;
#pragma unroll
  for (int i = 0; kHasDropout && i < kM * kOutV * 4; ++i)
    dv_frag[i / (kOutV * 4)][i / 4 % kOutV][i % 4] *= kept_times;
  const int kv_length =
      problem.kv_lengths ? problem.kv_lengths[batch] : static_cast<int>(problem.kv_len);
  const auto row_of = [&](int r) { return key_row(warp_row + r); };
  const auto zero_of = [&](int r) { return key_row(warp_row + r) >= kv_length; };
  T* dk_smem = reinterpret_cast<T*>(smem) + warp_row * StorePitch(kOutK * 8);
  T* dv_smem = reinterpret_cast<T*>(smem + Smem::kDk) + warp_row * StorePitch(kOutV * 8);
  StoreRows<kHeadDim>(dk_frag, dk_smem, RowSpan::Make(params.dk, batch, kv_head), first_k, row_of,
                      zero_of);
  StoreRows<kHeadDimV>(dv_frag, dv_smem, RowSpan::Make(params.dv, batch, kv_head), first_v, row_of,
                       zero_of);
}

}  // namespace spattn
