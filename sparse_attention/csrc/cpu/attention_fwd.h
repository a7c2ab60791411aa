// attention_fwd.h — block-sparse attention on the CPU, forward.
//
// Math, per batch b, head h, query i (sums run over the allowed keys j only):
//   s_ij = softmax_scale * <q_i, k_j>     lse_i = log sum_j exp(s_ij)
//   o_i  = sum_j exp(s_ij - lse_i) * v_j  (no allowed j: o_i = 0, lse_i = -inf)
//
// Mapping: one task per (batch, q tile, head), the last q tiles first: causal rows grow. A row's heads
//   lie side by side in memory, so they are taken one after another.
//   Vector lanes are queries, so row_max, row_sum and every step of the softmax are vertical, and
//   keys need no transposition, no packing and no padding.
// Tiles:   q_panels [panels][head_dim, kPanel]     k [kTileKV, head_dim]   v [kTileKV, head_dim_v]
//          s [kTileKV, kPanel], one panel at a time (L1)     o_panels [panels][head_dim_v, kPanel]
// Stages:  per key tile: load | per panel: s = k q | mask (PARTIAL only) | online softmax | o += v p
//          A panel skips the keys before the first and after the last that it attends to, so a tile
//          on the diagonal costs about half.
// Memory:  workspace a worker: about 4 (kTileQ (2 d + 2 dv) + kTileKV (d + dv)) bytes, 160 KB at 64
// Cost:    4 * block_q * block_kv * head_dim FLOP per computed block (two matmuls)
// Numerics: float32 inside, base-2 softmax with running maximum, lse in nats. Bitwise deterministic:
//          a task owns its rows and visits its keys in the plan's order, FULL blocks first.
// After:   Child et al. 2019 (arXiv:1904.10509); Milakov & Gimelshein 2018 (arXiv:1805.02867);
//          Dao et al. 2022 (arXiv:2205.14135).
#ifndef SPARSE_ATTENTION_CPU_ATTENTION_FWD_H_
#define SPARSE_ATTENTION_CPU_ATTENTION_FWD_H_

#include "leaks.h"
#include "parallel.h"
#include "tiles.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr float kLn2 = 0.69314718f;

// ---- scratch ----

struct FwdScratch {
  float *rows, *q_panels, *o_panels, *k, *v, *s;
  float *row_max, *row_sum;  // [panels][kPanel]; row_max in base 2, scaled
  KeyTile* keys;
  Leaks leaks;

  FwdScratch(Arena* arena, const SpattnProblem& p) {
    const int64_t queries = kMaxPanels * kPanel, widest = Max(p.head_dim, p.head_dim_v);
    rows = arena->Take<float>(queries * widest);
    q_panels = arena->Take<float>(queries * p.head_dim);
    o_panels = arena->Take<float>(queries * p.head_dim_v);
    k = arena->Take<float>(kTileKV * p.head_dim);
    v = arena->Take<float>(kTileKV * p.head_dim_v);
    s = arena->Take<float>(kTileKV * kPanel);
    row_max = arena->Take<float>(queries);
    row_sum = arena->Take<float>(queries);
    keys = arena->Take<KeyTile>(1);
    leaks = Leaks(arena->Take<float>(widest));
  }
};

// ---- stages ----

// s[j] = softmax_scale_log2 * k_j q, -inf where not attended; returns each query's largest.
template <bool kMasked>
inline RegisterTile<1> MatmulQK(const FwdScratch& x, KeyRange read, int head_dim,
                                const float* q_panel, float softmax_scale_log2,
                                const uint32_t* attends) {
  RegisterTile<1> largest;
  for (Vec& max : largest.v[0]) max = Vec{} - kInf;
  const auto matmul = [&](int j, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    const auto acc = RowProducts<kRows>(x.k + j * head_dim, head_dim, q_panel, head_dim);
    for (int r = 0; r < kRows; ++r) {
      for (int n = 0; n < kPanelVecs; ++n) {
        Vec s = acc.v[r][n] * softmax_scale_log2;
        if (kMasked) s = Select(LanesOfBits(attends[j + r] >> (n * kLanes)), s, Vec{} - kInf);
        largest.v[0][n] = Max(s, largest.v[0][n]);
        Store(x.s + (j + r) * kPanel + n * kLanes, s);
      }
    }
  };
  ForRowTiles(read.end, matmul, read.begin);
  return largest;
}

// s becomes p = 2^(s - row_max) under the new maximum; returns what older sums must be scaled by.
inline RegisterTile<1> OnlineSoftmax(const FwdScratch& x, KeyRange read, int panel,
                                     const RegisterTile<1>& largest) {
  RegisterTile<1> rescale;
  for (int n = 0; n < kPanelVecs; ++n) {
    float* row_max = x.row_max + panel * kPanel + n * kLanes;
    float* row_sum = x.row_sum + panel * kPanel + n * kLanes;
    const Vec old_max = Load(row_max), new_max = Max(old_max, largest.v[0][n]);
    // A query that has met no key keeps row_max = -inf; subtract 0 there, for -inf + inf is NaN.
    const Vec subtract = Select(new_max == -kInf, Vec{}, new_max);
    rescale.v[0][n] = Exp2(old_max - subtract);
    Vec sum = Load(row_sum) * rescale.v[0][n];
    for (int j = read.begin; j < read.end; ++j) {
      float* s = x.s + j * kPanel + n * kLanes;
      const Vec p = Exp2(Load(s) - subtract);
      Store(s, p);
      sum += p;
    }
    Store(row_max, new_max);
    Store(row_sum, sum);
  }
  return rescale;
}

// o_panel [head_dim_v, kPanel] = o_panel * rescale + v^T p
inline void MatmulPV(const FwdScratch& x, KeyRange read, int head_dim_v,
                     const RegisterTile<1>& rescale, float* o_panel) {
  ForRowTiles(head_dim_v, [&](int d, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    RegisterTile<kRows> acc = LoadTile<kRows>(o_panel + d * kPanel);
    for (auto& row : acc.v) {
      for (int n = 0; n < kPanelVecs; ++n) row[n] *= rescale.v[0][n];
    }
    MultiplyAdd<kColMajor>(acc, x.v + read.begin * head_dim_v + d, head_dim_v,
                           x.s + read.begin * kPanel, kPanel, read.count());
    StoreTile(acc, o_panel + d * kPanel);
  });
}

// o = o / row_sum, lse = ln 2 * (row_max + log2 row_sum); 0 and -inf where no key was met.
inline void Finish(const FwdScratch& x, const SpattnFwdParams& params, int64_t b, int64_t head,
                   const QTile& tile) {
  const SpattnProblem& problem = params.problem;
  const int head_dim_v = problem.head_dim_v;
  for (int panel = 0; panel < tile.panels; ++panel) {
    float* o_panel = x.o_panels + panel * head_dim_v * kPanel;
    for (int n = 0; n < kPanelVecs; ++n) {
      const Vec sum = Load(x.row_sum + panel * kPanel + n * kLanes);
      const Vec inverse = Select(sum == Vec{}, Vec{}, 1.0f / sum);
      for (int d = 0; d < head_dim_v; ++d) {
        float* o = o_panel + d * kPanel + n * kLanes;
        Store(o, Load(o) * inverse);
      }
    }
  }
  PanelsToRows(x.o_panels, tile.panels, head_dim_v, head_dim_v, x.rows);
  StoreQRows(x.rows, params.o, problem, b, head, tile, head_dim_v, head_dim_v);
  float* lse = params.lse + (b * problem.heads + head) * problem.q_len;
  for (int i = 0; i < tile.panels * kPanel; ++i) {
    if (tile.rows[i] < 0) continue;
    const float log_sum = __builtin_logf(x.row_sum[i]);  // log 0 = -inf
    lse[tile.rows[i]] = x.row_sum[i] == 0.0f ? -kInf : x.row_max[i] * kLn2 + log_sum;
  }
}

// ---- kernel ----

template <bool kMasked>
inline void FwdKeys(const FwdScratch& x, const SpattnFwdParams& params, int64_t b, int64_t head,
                    int64_t q_tile, int panels) {
  const SpattnProblem& problem = params.problem;
  const int head_dim = problem.head_dim, head_dim_v = problem.head_dim_v;
  const int64_t kv_head = head / (problem.heads / problem.kv_heads);
  KeyWalk<kMasked> walk(problem, params.plan, params.plan.heads == 1 ? 0 : head, q_tile, b);
  KeyTile* keys = x.keys;
  Leaks leaks = x.leaks;
  while (walk.Next(keys)) {
    LoadKeys(params.k, problem, b, kv_head, *keys, head_dim, head_dim, x.k);
    LoadKeys(params.v, problem, b, kv_head, *keys, head_dim_v, head_dim_v, x.v);
    if (kMasked) leaks.TakeOut(x.v, keys->count, head_dim_v, head_dim_v);
    for (int panel = 0; panel < panels; ++panel) {
      const KeyRange read = keys->read[panel];
      if (read.count() == 0) continue;
      const float* q_panel = x.q_panels + panel * head_dim * kPanel;
      float* o_panel = x.o_panels + panel * head_dim_v * kPanel;
      const RegisterTile<1> largest = MatmulQK<kMasked>(
          x, read, head_dim, q_panel, problem.softmax_scale * kLog2E, keys->attends[panel]);
      const RegisterTile<1> rescale = OnlineSoftmax(x, read, panel, largest);
      MatmulPV(x, read, head_dim_v, rescale, o_panel);
      for (int n = 0; kMasked && n < leaks.count; ++n) {
        const int j = leaks.index[n];
        const float* row = leaks.Row(params.v, problem, b, kv_head, keys->rows[j], head_dim_v);
        AddToPanel(row, head_dim_v, x.s + j * kPanel, keys->attends[panel][j], o_panel);
      }
    }
  }
}

inline void FwdTask(const FwdScratch& x, const SpattnFwdParams& params, int64_t task) {
  const SpattnProblem& problem = params.problem;
  const int64_t q_tiles = params.plan.q_tiles;
  const int64_t head = task % problem.heads, b = task / problem.heads / q_tiles;
  const int64_t q_tile = q_tiles - 1 - task / problem.heads % q_tiles;
  const QTile tile(problem, params.plan, q_tile);
  const int64_t queries = static_cast<int64_t>(tile.panels) * kPanel;
  LoadQRows(params.q, problem, b, head, tile, problem.head_dim, problem.head_dim, x.rows);
  RowsToPanels(x.rows, tile.panels, problem.head_dim, problem.head_dim, x.q_panels);
  Zero(x.o_panels, queries * problem.head_dim_v);
  Zero(x.row_sum, queries);
  for (int i = 0; i < queries; ++i) x.row_max[i] = -kInf;
  FwdKeys<false>(x, params, b, head, q_tile, tile.panels);
  FwdKeys<true>(x, params, b, head, q_tile, tile.panels);
  Finish(x, params, b, head, tile);
}

// ---- launcher ----

inline int64_t FwdScratchBytes(const SpattnProblem& problem) {
  Arena arena(nullptr);
  FwdScratch scratch(&arena, problem);
  return arena.used();
}

inline int64_t FwdWorkspace(const SpattnFwdParams& params, int32_t workers) {
  return FwdScratchBytes(params.problem) * Max(workers, 1);
}

inline void Fwd(const SpattnFwdParams& params, const SpattnThreads& threads, void* workspace) {
  const int64_t tasks = params.problem.batch * params.problem.heads * params.plan.q_tiles;
  const int64_t scratch_bytes = FwdScratchBytes(params.problem);
  ParallelFor(threads, tasks, [&](int64_t task, int32_t worker) {
    Arena arena(static_cast<char*>(workspace) + worker * scratch_bytes);
    FwdTask(FwdScratch(&arena, params.problem), params, task);
  });
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_ATTENTION_FWD_H_
