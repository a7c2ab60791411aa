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
// After:   Child et al. 2019 (arXiv:1904.10509); Milakov & Gimelshein 2018 (arXiv:1805.02867);
//          Dao et al. 2022 (arXiv:2205.14135), Dao 2023 (arXiv:2307.08691).
// Measured: benchmarks/results/gpu_kernels_h100.txt
#include "cuda/device/matmul.cuh"
#include "cuda/device/pipeline.cuh"

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

struct OnlineSoftmax {
  // Of a row, scaled as exponents are (scale_exp). Rounded once, and the same in all places: what
  // the exponentials of a row were shifted by must cancel to the last bit where they meet.
  float shift[kM][2];    // subtracted; 0 as long as there was no key
  float limit[kM][2];    // the largest score that the shift is good for; -inf: any key is more
  float row_sum[kM][2];  // this lane's share

  // exp(score - shift) may be up to 2^8: no type here overflows, 16 bits are as exact there, and
  // once a row has seen some keys its shift hardly moves. float32 takes the maximum itself.
  static constexpr float kSlack = kIsFloat ? 0 : 8;

  __forceinline__ void Init() {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      shift[i / 2][i % 2] = row_sum[i / 2][i % 2] = 0;
      limit[i / 2][i % 2] = -kInf;
    }
  }

  // Turns scores into exp(s - shift), after it has rescaled what came before where that must be.
  __forceinline__ void Update(float (&s)[kM][kN][4], float (&o)[kM][kOut][4], float scale_exp) {
    float peaks[kM][2];
    bool is_over = false;
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float peak = s[m][0][h * 2], other_peak = s[m][0][h * 2 + 1];  // two chains: half the latency
#pragma unroll
      for (int n = 1; n < kN; ++n) {
        peak = fmaxf(peak, s[m][n][h * 2]);
        other_peak = fmaxf(other_peak, s[m][n][h * 2 + 1]);
      }
      peaks[m][h] = __fmul_rn(fmaxf(peak, other_peak), scale_exp);
      is_over |= peaks[m][h] > limit[m][h];
    }
    if (__any_sync(kFullWarp, is_over)) Shift(peaks, o);
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float sums[2] = {row_sum[m][h], 0};
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const float p = Exp(fmaf(s[m][n][h * 2 + j], scale_exp, -shift[m][h]));
          s[m][n][h * 2 + j] = p;
          sums[j] += p;
        }
      }
      row_sum[m][h] = sums[0] + sums[1];
    }
  }

  // Shifts the rows whose limit is exceeded, and those alone: no row may notice another's keys.
  // peaks: maxima over this lane's columns.
  __forceinline__ void Shift(const float (&peaks)[kM][2], float (&o)[kM][kOut][4]) {
    MatmulWait<0>(o);
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float peak = peaks[m][h];
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(kFullWarp, peak, 2));
      if (!(peak > limit[m][h])) continue;
      const float correction = limit[m][h] == -kInf ? 1 : Exp(shift[m][h] - peak);
      shift[m][h] = peak;
      limit[m][h] = peak + kSlack;
      row_sum[m][h] *= correction;
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
        o[m][n][h * 2] *= correction;
        o[m][n][h * 2 + 1] *= correction;
      }
    }
  }

  // Divides o by the sums; returns lse of this lane's rows in nats.
  __forceinline__ void Finish(float (&o)[kM][kOut][4], float (&lse)[kM][2]) {
#pragma unroll
    for (int i = 0; i < kM * 2; ++i) {
      const int m = i / 2, h = i % 2;
      float sum = row_sum[m][h];
      sum += __shfl_xor_sync(kFullWarp, sum, 1);
      sum += __shfl_xor_sync(kFullWarp, sum, 2);
      // One rounding, not two, for float32: delta = <do, o> cancels against dp in the backward.
      const float divisor = sum == 0 ? 1 : sum, inverse = 1 / divisor;
      lse[m][h] = sum == 0 ? -kInf : LogSumExp(shift[m][h], sum);
#pragma unroll
      for (int n = 0; n < kOut; ++n) {
#pragma unroll
        for (int j = h * 2; j < h * 2 + 2; ++j) {
          o[m][n][j] = kIsFloat ? o[m][n][j] / divisor : o[m][n][j] * inverse;
        }
      }
    }
  }

  // log(sum * exp(shift)). The float32 backward takes exp of it again and would double an error of
  // one unit in the last place.
  DEVICE float LogSumExp(float shift, float sum) {
    if (kIsFloat) return static_cast<float>(shift + log(double(sum)));
    return fmaf(shift, 1 / kExpScale, logf(sum));
  }
};

// Gives the non-finite v that were zeroed in a PARTIAL tile to the rows that attend to them: with p
// > 0, p * Inf is Inf and p * NaN is NaN, so adding them once is enough. Rare, hence not fast.
template <typename KeyRow>
DEVICE void AddNonfinite(float (&o)[kM][kOut][4], const uint32_t* mask_smem, const RowSpan& v,
                         KeyRow key_row) {
#pragma unroll 1
  for (int key = 0; key < kTileKV; ++key) {
    const int row = key_row(key);
    const int lane = threadIdx.x % 32;
    const uint32_t allowed = LaneMask<kTileRows, kWarpRows>(mask_smem, key);
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
  const auto q_row = [&](int r) { return r < kTileQ ? q_rows.Row(tile * kTileQ + r) : -1; };
  const auto needs_mask = [&](const Blocks& blocks) {
    const int first = list.FirstPosition(blocks);
    return __any_sync(
        kFullWarp, warp.lane < List::kGather &&
                       (first < 0 || blocks.mask_id >= 0 || !kv_rows.AllExist(first, List::kRun)));
  };
  const auto load = [&](auto masked, int buffer, const Blocks& blocks) {
    constexpr bool kMasked = decltype(masked)::kValue;
    const Stage stage = stage_of(buffer);
    LoadRowPair<kTileKV, kHeadDim, kHeadDimV, kThreads, !kMasked>(
        stage.k, k, stage.v, v, [&](int r) {
          return kMasked ? kv_rows.Row(list.Position(blocks, r))
                         : kv_rows.ExistingRow(list.ExistingPosition(blocks, r));
        });
    if (kMasked) LoadMask<kTileQ, kThreads>(stage.mask, list, blocks, plan.mask_bits, kv_rows);
  };
  const auto zero_nonfinite = [&](int buffer) {
    return ZeroNonfiniteRows<kTileKV, kHeadDimV, kThreads>(stage_of(buffer).v);
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

  using Scores = float[kM][kN][4];
  const auto scores = [&](Scores& s, const Stage& stage, int sub) {
    q_operand.Locate(q_smem);
    const auto k_sub = SmemOperand::Make(stage.k + sub * KTile::kRowPitch);
    MatmulABt<KTile>(s, q_operand, k_sub, warp.scratch);
  };
  const auto scaled = [&](Scores& s) {
#pragma unroll
    for (int i = 0; !SPATTN_SCALE_POSITIVE && i < kM * kN * 4; ++i) {
      s[i / (kN * 4)][i / 4 % kN][i % 4] *= first_scale;
    }
  };
  const auto output = [&](const Scores& p, const Stage& stage, int sub) {
    const auto v_sub = SmemOperand::Make(stage.v + sub * VTile::kRowPitch);
    MatmulPB<VTile>(o_frag, p, v_sub, warp.scratch);
  };

  const auto step = [&](auto masked, int n, int buffer, bool has_nonfinite, auto prefetch) {
    const Stage stage = stage_of(buffer);
    if (n == 0) q_operand.Load(q_smem, warp.index * kWarpRows);
    if constexpr (masked || !kHasWgmma) {
#pragma unroll 1
      for (int sub = 0; sub < kTileKV; sub += kSubKV) {
        if (masked && !AnyAllowed<kTileRows, kWarpRows, kSubKV>(stage.mask, sub)) continue;
        Scores s_frag;
        scores(s_frag, stage, sub);
        MatmulWait<0>(s_frag);
        scaled(s_frag);
        if (masked) ApplyMask(s_frag, stage.mask, sub);
        softmax.Update(s_frag, o_frag, scale * kExpScale);
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
        scaled(s_frags[i]);
        softmax.Update(s_frags[i], o_frag, scale * kExpScale);
        output(s_frags[i], stage, i * kSubKV);
      }
      MatmulWait<0>(o_frag);
    }
    if (masked && has_nonfinite) {
      const Blocks blocks = list.Fetch(n);
      AddNonfinite(o_frag, stage.mask, v,
                   [&](int r) { return kv_rows.Row(list.Position(blocks, r)); });
    }
  };
  PassTiles<kStages, SPATTN_MIN_CTAS>(list, needs_mask, load, zero_nonfinite, step);

  // ---- epilogue ----

  float lse[kM][2];
  softmax.Finish(o_frag, lse);
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
