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
//          k_smem, v_smem [kStages][kTileKV, dim], keys gathered from kTileKV / kPlanKV blocks
//          mask_smem [kStages][kTileKV], words with a bit for each of the kTileRows
//          s_frag [rows of a warp, kSubKV] f32, registers
//          o_frag [rows of a warp, head_dim_v] f32, registers
// Stages:  load(n+1) | s = q kT | mask (where a block is PARTIAL or ends early) | online softmax
//          | o += p v; with wgmma, in tiles without mask, products of one sub-tile beside the
//          softmax of the other
// Memory:  smem = (kTileRows * dim + kStages * kTileKV * both dims) * sizeof(T) and padding (Smem)
// Cost:    4 * head_dim FLOP per computed pair;
//          HBM reads: q once, k and v once per q tile that lists them; writes: o, lse.
// Numerics: inputs T, accumulation f32, exp2 (float32: exp) with scale_exp so that one FFMA feeds
//          it; p is rounded to T before p v; lse in nats. Bitwise deterministic: a CTA owns its
//          rows, no atomics. A masked key cannot leak, NaN and Inf included: its score is replaced,
//          and non-finite v are taken out of masked tiles and given back to the rows that do attend
//          to them.
// Rules:   score_rule.cuh; scores change after q kT, weights are dropped before p v.
// After:   Child et al. 2019 (arXiv:1904.10509); Milakov & Gimelshein 2018 (arXiv:1805.02867);
//          Dao et al. 2022 (arXiv:2205.14135), Dao 2023 (arXiv:2307.08691).
// Measured: benchmarks/results/gpu_kernels_h100.txt
#include "cuda/device/pipeline.cuh"
#include "cuda/device/score_rule.cuh"
#include "cuda/device/softmax.cuh"

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
constexpr int kN = kSubKV / 8, kOut = PaddedDim(kHeadDimV) / 8;
static_assert(kM * 16 * kWarps == kTileRows && (kM == 1 || kM == 2), "a warp has 16 or 32 rows");
static_assert(kTileKV % kSubKV == 0 && kSubKV % 32 == 0, "sub-tiles");
using List = BlockList<kTileKV, kPlanKV>;
using QTile = Tile<kTileRows, kHeadDim>;
using KTile = Tile<kTileKV, kHeadDim>;
using VTile = Tile<kTileKV, kHeadDimV>;

struct Smem {
  static constexpr int kO =
      kTileRows * StorePitch(kHeadDimV) * sizeof(T);  // takes q's place at the end
  static constexpr int kQ = RoundUp(kHasWgmma ? QTile::kBytes : Max(QTile::kBytes, kO), kTileAlign);
  static constexpr int kMask = kTileKV * MaskWords(kTileRows) * 4;
  static constexpr int kWords = kTileKV * PanelRule<true, kM>::kWords * 4;
  static constexpr int kStage = RoundUp(KTile::kBytes + VTile::kBytes + kMask + kWords, kTileAlign);
  static constexpr int kScratch = ScratchBytes<kSubKV>();
  static constexpr int kBytes = Max(kQ + kStages * kStage + kWarps * kScratch, kO);
};
static_assert(Smem::kBytes == SPATTN_SHARED_MEMORY, "the host counts other bytes");

// ---- device helpers ----

struct Stage {
  T *k, *v;
  uint32_t *mask, *words;  // words: of the keys, for dropout
};

struct Warp {
  int index, lane;
  float* scratch;
};

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads, SPATTN_MIN_CTAS)
    attention_fwd(const __grid_constant__ Given<SpattnCudaFwdParams> given) {
  extern __shared__ __align__(128) unsigned char smem[];
  const SpattnCudaFwdParams& params = CallOf(given);
  const SpattnCudaRule& rule = RuleOf(given);
  const SpattnProblem& problem = params.problem;
  const SpattnTilePlan& plan = params.by_q;

  // A plan may have tiles that no query is in; the grid has not.
  const int tile = static_cast<int>(gridDim.x - 1 - blockIdx.x), head = blockIdx.y,
            batch = blockIdx.z;
  const int kv_head =
      problem.heads == problem.kv_heads ? head : head / (problem.heads / problem.kv_heads);
  const RowMap q_rows = RowMap::Make(problem.q_len, problem.row_stride, problem.q_len);
  const RowMap kv_rows =
      RowMap::Make(problem.kv_len, problem.row_stride,
                   problem.kv_lengths ? problem.kv_lengths[batch] : problem.kv_len);
  const RowSpan k = RowSpan::Make(params.k, batch, kv_head),
                v = RowSpan::Make(params.v, batch, kv_head);
  const List list = List::MakeLeft(plan, plan.heads == 1 ? 0 : head, tile, batch, rule.q_tile_ends);
  const Warp warp{static_cast<int>(threadIdx.x / 32), static_cast<int>(threadIdx.x % 32),
                  reinterpret_cast<float*>(smem + Smem::kQ + kStages * Smem::kStage +
                                           threadIdx.x / 32 * Smem::kScratch)};
  T* q_smem = reinterpret_cast<T*>(smem);
  const auto stage_of = [&](int buffer) {
    unsigned char* at = smem + Smem::kQ + buffer * Smem::kStage;
    return Stage{reinterpret_cast<T*>(at), reinterpret_cast<T*>(at + KTile::kBytes),
                 reinterpret_cast<uint32_t*>(at + KTile::kBytes + VTile::kBytes),
                 reinterpret_cast<uint32_t*>(at + KTile::kBytes + VTile::kBytes + Smem::kMask)};
  };
  const auto q_row = [&](int r) { return r < kTileQ ? q_rows.Row(tile * kTileQ + r) : -1; };
  const auto needs_mask = [&](const Blocks& blocks) {
    const int first = list.FirstPosition(blocks);
    return __any_sync(
        kFullWarp, warp.lane < List::kGather &&
                       (first < 0 || blocks.IsPartial() || !kv_rows.AllExist(first, List::kRun)));
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
  const auto zero_nonfinite = [&](int buffer) {
    return ZeroNonfiniteRows<kTileKV, kHeadDimV, kThreads>(stage_of(buffer).v);
  };

  LoadRows<kTileRows, kHeadDim, kThreads, false>(q_smem, RowSpan::Make(params.q, batch, head),
                                                 q_row);
  RowOperand<kM, QTile, SPATTN_Q_IN_REGISTERS> q_operand;
  float o_frag[kM][kOut][4] = {};
  OnlineSoftmax<kM, kN, kOut> softmax;
  softmax.Init();
#if SPATTN_SCALE_POSITIVE
  const float scale = problem.softmax_scale, first_scale = 1;
#else
  const float scale = 1,
              first_scale = problem.softmax_scale;  // the largest score is not the largest <q, k>
#endif
  const auto scale_exp = [&] { return kChangesScores ? 1 : scale * kExpScale; };
  PanelRule<true, kM> panel_rule{rule, kv_rows};
  panel_rule.Init(problem, batch, head, [&](int m, int h) {
    return q_row(warp.index * kWarpRows + m * 16 + h * 8 + warp.lane / 4);
  });

  using Scores = float[kM][kN][4];
  const auto scores = [&](Scores& s, const Stage& stage, int sub) {
    q_operand.Locate(q_smem);
    const auto k_sub = SmemOperand::Make(stage.k + sub * KTile::kRowPitch);
    MatmulABt<KTile>(s, q_operand, k_sub, warp.scratch);
  };
  const auto scaled = [&](Scores& s, const Blocks& blocks, int sub) {
    if (kChangesScores) {
      panel_rule.ApplyToScores(s, [&](int n) { return list.Column(blocks, sub + n * 8); });
    }
#pragma unroll
    for (int i = 0; !kChangesScores && !SPATTN_SCALE_POSITIVE && i < kM * kN * 4; ++i) {
      s[i / (kN * 4)][i / 4 % kN][i % 4] *= first_scale;
    }
  };
  const auto drop = [&](Scores& p, const Stage& stage, int sub) {
    if (kHasDropout) panel_rule.Drop(p, stage.words + sub);
  };
  const auto output = [&](const Scores& p, const Stage& stage, int sub) {
    const auto v_sub = SmemOperand::Make(stage.v + sub * VTile::kRowPitch);
    MatmulPB<VTile>(o_frag, p, v_sub, warp.scratch);
  };

  const auto step = [&](auto masked, int n, int buffer, bool has_nonfinite, auto prefetch) {
    const Stage stage = stage_of(buffer);
    const Blocks blocks = kLooksAtDistances ? list.Fetch(n) : Blocks{};
    if (n == 0) q_operand.Load(q_smem, warp.index * kWarpRows);
    if constexpr (masked || !kHasWgmma) {
#pragma unroll 1
      for (int sub = 0; sub < kTileKV; sub += kSubKV) {
        if (masked && !AnyAllowed<kTileRows, kWarpRows, kSubKV>(stage.mask, sub)) continue;
        Scores s_frag;
        scores(s_frag, stage, sub);
        MatmulWait<0>(s_frag);
        scaled(s_frag, blocks, sub);
        if (masked) ApplyMask<kTileRows>(s_frag, stage.mask, sub);
        softmax.Shift(s_frag, o_frag, scale_exp());
        softmax.Rescale(o_frag);
        softmax.Exponentiate(s_frag, scale_exp());
        drop(s_frag, stage, sub);
        output(s_frag, stage, sub);
        MatmulWait<0>(o_frag);
      }
    } else {
      // s = q kT of the second sub-tile is queued before the softmax of the first, or behind its
      // p v where registers hold but one s; that p v goes on beside the softmax of the second.
      constexpr int kSubs = kTileKV / kSubKV;
      constexpr bool kAhead = SPATTN_MIN_CTAS == 1 || !SPATTN_ROW_STRIDED;
      static_assert(kSubs <= 2, "what is under way at each wait");
      Scores s_frags[kSubs];
      scores(s_frags[0], stage, 0);
      prefetch();
#pragma unroll
      for (int i = 1; kAhead && i < kSubs; ++i) scores(s_frags[i], stage, i * kSubKV);
#pragma unroll
      for (int i = 0; i < kSubs; ++i) {
        if (!kAhead && i > 0) scores(s_frags[i], stage, i * kSubKV);
        MatmulWait<kAhead ? kSubs - 1 : 0>(s_frags[i]);
        scaled(s_frags[i], blocks, i * kSubKV);
        softmax.Shift(s_frags[i], o_frag, scale_exp());
        softmax.Exponentiate(s_frags[i], scale_exp());
        drop(s_frags[i], stage, i * kSubKV);
        MatmulWait<0>(o_frag);  // of the sub-tile before, long complete
        softmax.Rescale(o_frag);
        output(s_frags[i], stage, i * kSubKV);
      }
      MatmulWait<0>(o_frag);
    }
    if (masked && has_nonfinite) {
      const Blocks blocks = list.Fetch(n);
      AddNonfinite<kTileRows, kTileKV, kHeadDimV>(
          o_frag, stage.mask, v, [&](int r) { return kv_rows.Row(list.Position(blocks, r)); });
    }
  };
  PassTiles<kStages, SPATTN_MIN_CTAS>(list, needs_mask, load, zero_nonfinite, step);

  // ---- epilogue ----

  float lse[kM][2];
  softmax.Finish(o_frag, lse, kHasDropout ? rule.kept_times : 1);
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
