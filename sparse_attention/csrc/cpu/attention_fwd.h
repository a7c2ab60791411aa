// attention_fwd.h — block-sparse attention on the CPU, forward.
//
// Math, per batch b, head h, query i (sums run over the allowed keys j only):
//   s_ij = softmax_scale * <q_i, k_j>     lse_i = log sum_j exp(s_ij)
//   o_i  = sum_j exp(s_ij - lse_i) * v_j  (no allowed j: o_i = 0, lse_i = -inf)
//
// Mapping: one task per (batch, q tile, few heads), the last q tiles first: causal rows grow.
//   Vector lanes are queries, so row_max, row_sum and every step of the softmax are vertical, and
//   keys need no transposition, no packing and no padding.
// Tiles:   of each head, in words of one float or two bfloat16 (terms.h):
//          q_panels [panels][head_dim, kPanel]     k [kTileKV, head_dim]   v [kTileKV, head_dim_v]
//          s [kTileKV, kPanel], one panel at a time (L1)     o_panels [panels][head_dim_v, kPanel]
// Stages:  per key tile: load | per panel: s = k q | mask (PARTIAL only) | online softmax | o += v p
//          A panel skips the keys before the first and after the last that it attends to, so a tile
//          on the diagonal costs about half.
// Memory:  workspace a worker: 4 (kTileQ + kTileKV) (d + dv) bytes a head, 96 KB at 64, for four heads
// Cost:    4 * tile_q * block_size * head_dim FLOP per computed block (two matmuls)
// Numerics: float32 inside, and p rounded to bfloat16 where words are pairs; base-2 softmax with running
//          maximum, lse in nats. Bitwise deterministic: a task owns its rows and visits its keys in the
//          plan's order, FULL blocks first.
// After:   Child et al. 2019 (arXiv:1904.10509); Milakov & Gimelshein 2018 (arXiv:1805.02867);
//          Dao et al. 2022 (arXiv:2205.14135).
#ifndef SPARSE_ATTENTION_CPU_ATTENTION_FWD_H_
#define SPARSE_ATTENTION_CPU_ATTENTION_FWD_H_

#include "cpu/leaks.h"
#include "cpu/parallel.h"
#include "cpu/score_rule.h"
#include "cpu/tiles.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr float kLn2 = 0.69314718f;

// ---- scratch ----

struct FwdScratch {
  float *q_panels, *o_panels;  // [heads][kMaxPanels][dim, kPanel]
  float *row_max, *row_sum;    // [heads][kTileQ]; row_max in base 2, scaled
  float *k, *v;                // [heads][kTileKV, dim]
  float *v_columns, *s;        // of one head; s: of one panel
  KeyTile* keys;
  Leaks leaks;
  RuleScratch rule;

  FwdScratch(Arena* arena, const SpattnProblem& p, bool has_rule, int heads) {
    q_panels = arena->Take<float>(heads * kTileQ * p.head_dim);
    o_panels = arena->Take<float>(heads * kTileQ * p.head_dim_v);
    row_max = arena->Take<float>(heads * kTileQ);
    row_sum = arena->Take<float>(heads * kTileQ);
    k = arena->Take<float>(heads * kTileKV * p.head_dim);
    v = arena->Take<float>(heads * kTileKV * p.head_dim_v);
    v_columns = arena->Take<float>(kTileKV * p.head_dim_v);
    s = arena->Take<float>(kTileKV * kPanel);
    keys = arena->Take<KeyTile>(1);
    leaks = Leaks(arena->Take<float>(p.head_dim_v));
    if (has_rule) rule = RuleScratch(arena, heads);
  }
};

// ---- stages ----

// s[j] = softmax_scale_log2 * k_j q, -inf where not attended; returns each query's largest.
template <class Terms, bool kMasked>
SPATTN_STAGE RegisterTile<1> MatmulQK(const float* k, const float* q_panel, int head_dim,
                                      KeyRange read, float softmax_scale_log2,
                                      const uint32_t* attends, float* s) {
  RegisterTile<1> largest;
  for (Vec& max : largest.v[0]) max = Vec{} - kInf;
  const int words = head_dim / Terms::kTerms;
  const auto matmul = [&](int j, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    const auto acc = RowProducts<Terms, kRows>(k + j * words, words, q_panel, words);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVecs; ++n) {
        Vec s_rn = acc.v[r][n] * softmax_scale_log2;
        if (kMasked) {
          s_rn = Select(LanesOfBits(attends[j + r] >> (n * kLanes)), s_rn, Vec{} - kInf);
        }
        largest.v[0][n] = Max(s_rn, largest.v[0][n]);
        Store(s + (j + r) * kPanel + n * kLanes, s_rn);
      }
    }
  };
  ForRowTiles(read.end, matmul, read.begin);
  return largest;
}

// s becomes p = 2^(s - row_max) under the new maximum, as columns; returns what older sums must be
// scaled by.
template <class Terms, class Rule>
SPATTN_STAGE RegisterTile<1> OnlineSoftmax(KeyRange read, const RegisterTile<1>& largest,
                                           const Rule& rule, float* row_max, float* row_sum,
                                           float* s) {
  constexpr int kTerms = Terms::kTerms;
  RegisterTile<1> rescale;
#pragma GCC unroll 2
  for (int n = 0; n < kPanelVecs; ++n) {
    const Vec old_max = Load(row_max + n * kLanes), new_max = Max(old_max, largest.v[0][n]);
    // A query that has met no key keeps row_max = -inf; subtract 0 there, for -inf + inf is NaN.
    const Vec subtract = Select(new_max == -kInf, Vec{}, new_max);
    rescale.v[0][n] = Exp2(old_max - subtract);
    Vec sum = Load(row_sum + n * kLanes) * rescale.v[0][n];
    for (int j = read.begin; j < read.end; j += kTerms) {
      Vec p[kTerms];
      for (int term = 0; term < kTerms; ++term) {
        p[term] = Vec{};
        if (j + term < read.end) {
          p[term] = Exp2(Load(s + (j + term) * kPanel + n * kLanes) - subtract);
        }
        sum += p[term];
        if (j + term < read.end) p[term] = rule.Drop(p[term], j + term, n);
      }
      Store(s + j / kTerms * kPanel + n * kLanes, Terms::Column(p));
    }
    Store(row_max + n * kLanes, new_max);
    Store(row_sum + n * kLanes, sum);
  }
  return rescale;
}

// o_panel [head_dim_v, kPanel] = o_panel * rescale + v^T p
template <class Terms>
SPATTN_STAGE void MatmulPV(const float* v_columns, const float* p, int head_dim_v, KeyRange read,
                           const RegisterTile<1>& rescale, float* o_panel) {
  const int begin = read.begin / Terms::kTerms;
  const int end = static_cast<int>(CeilDiv(read.end, Terms::kTerms));
  ForRowTiles(head_dim_v, [&](int d, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    RegisterTile<kRows> acc = LoadTile<kRows>(o_panel + d * kPanel);
#pragma GCC unroll 16
    for (auto& row : acc.v) {
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVecs; ++n) row[n] *= rescale.v[0][n];
    }
    MultiplyAdd<Terms, kColMajor>(acc, v_columns + begin * head_dim_v + d, head_dim_v,
                                  p + begin * kPanel, kPanel, end - begin);
    StoreTile(acc, o_panel + d * kPanel);
  });
}

// o = o / row_sum, lse = ln 2 * row_max + ln row_sum; 0 and -inf where no key was met.
inline void Finish(const FwdScratch& x, const SpattnFwdParams& params, const Heads& heads,
                   const QTile& tile) {
  const SpattnProblem& problem = params.problem;
  for (int h = 0; h < heads.count; ++h) {
    float* lse = params.lse + (heads.b * problem.heads + heads[h]) * problem.q_len;
    for (int i = 0; i < tile.panels * kPanel; ++i) {
      if (tile.rows[i] < 0) continue;
      const float row_sum = x.row_sum[h * kTileQ + i], row_max = x.row_max[h * kTileQ + i];
      lse[tile.rows[i]] = row_sum == 0.0f ? -kInf : row_max * kLn2 + __builtin_logf(row_sum);
    }
  }
  const auto inverse = [&](int h, int i) {
    const float row_sum = x.row_sum[h * kTileQ + i];
    return row_sum == 0.0f ? 0.0f : 1.0f / row_sum;
  };
  StoreQPanels(x.o_panels, inverse, problem, heads, tile, problem.head_dim_v, params.o);
}

// ---- kernel ----

// One key tile for one head: v_columns are the tile's, leaks what was taken out of them.
template <class Terms, bool kMasked, bool kHasRule>
inline void FwdTile(const FwdScratch& x, const SpattnFwdParams& params, const Heads& heads,
                    const Heads& kv_heads, int kv, int h, const QTile& tile, const float* v_columns,
                    const Leaks& leaks) {
  const SpattnProblem& problem = params.problem;
  const int head_dim = problem.head_dim, head_dim_v = problem.head_dim_v;
  const float scale_log2 = problem.softmax_scale * kLog2E;
  const KeyTile& keys = *x.keys;
  const float* k = x.k + kv * kTileKV * head_dim / Terms::kTerms;
  if (kHasRule) x.rule.SetKeys(params.rule, heads.b, heads[h], keys);
  for (int panel = 0; panel < tile.panels; ++panel) {
    const KeyRange read = keys.read[panel];
    if (read.count() == 0) continue;
    const int64_t first = h * kTileQ + panel * kPanel;
    const float* q_panel = x.q_panels + first * head_dim / Terms::kTerms;
    float* o_panel = x.o_panels + first * head_dim_v;
    const uint32_t* attends = keys.attends[panel];
    RegisterTile<1> rescale;
    const auto matmul_qk = [&] {
      return MatmulQK<Terms, kMasked>(k, q_panel, head_dim, read, scale_log2, attends, x.s);
    };
    const auto online_softmax = [&](const RegisterTile<1>& largest, const auto& rule) {
      rescale =
          OnlineSoftmax<Terms>(read, largest, rule, x.row_max + first, x.row_sum + first, x.s);
    };
    if constexpr (kHasRule) {
      const PanelRule rule(params.rule, x.rule, heads[h], h, tile, panel, keys, nullptr);
      RegisterTile<1> largest = matmul_qk();
      if (rule.ChangesScores()) largest = rule.Apply<false>(read, attends, x.s);
      online_softmax(largest, rule);
    } else {
      online_softmax(matmul_qk(), NoRule());
    }
    MatmulPV<Terms>(v_columns, x.s, head_dim_v, read, rescale, o_panel);
    for (int n = 0; kMasked && n < leaks.count; ++n) {
      const int j = leaks.index[n];
      const float* row =
          leaks.Row(params.v, problem, kv_heads.b, kv_heads[kv], keys.rows[j], head_dim_v);
      const auto p = [&](int i) { return Terms::TermOfColumns(x.s, kPanel, j, i); };
      AddToPanel(row, head_dim_v, p, attends[j], o_panel);
    }
  }
}

template <class Terms, bool kMasked, bool kHasRule>
inline void FwdKeys(const FwdScratch& x, const SpattnFwdParams& params, const Heads& heads,
                    int64_t q_tile, const QTile& tile, const Admits* admits) {
  const SpattnProblem& problem = params.problem;
  const int head_dim = problem.head_dim, head_dim_v = problem.head_dim_v;
  const int64_t group = problem.heads / problem.kv_heads, first = heads.first / group;
  const int64_t last = heads[heads.count - 1] / group;
  const Heads kv_heads = {heads.b, first, 1, static_cast<int>(last - first + 1)};
  KeyWalk<kMasked> walk(problem, params.plan, params.plan.heads == 1 ? 0 : heads.first, q_tile,
                        heads.b, admits);
  Leaks leaks = x.leaks;
  while (walk.Next(x.keys)) {
    LoadKeys<Terms>(params.k, problem, kv_heads, *x.keys, head_dim, x.k);
    LoadKeys<Terms>(params.v, problem, kv_heads, *x.keys, head_dim_v, x.v);
    const int count = x.keys->count, words_v = head_dim_v / Terms::kTerms;
    int h = 0;
    for (int kv = 0; kv < kv_heads.count; ++kv) {
      float* v = x.v + kv * kTileKV * words_v;
      if (kMasked) leaks.TakeOut<Terms>(v, count, head_dim_v, words_v);
      const float* v_columns = Terms::Columns(v, count, words_v, x.v_columns);
      for (; h < heads.count && heads[h] / group == kv_heads[kv]; ++h) {
        FwdTile<Terms, kMasked, kHasRule>(x, params, heads, kv_heads, kv, h, tile, v_columns,
                                          leaks);
      }
    }
  }
}

template <class Terms>
inline void FwdTask(const FwdScratch& x, const SpattnFwdParams& params, const Heads& heads,
                    int64_t q_tile) {
  const SpattnProblem& problem = params.problem;
  const QTile tile(problem, params.plan, q_tile);
  LoadQPanels<Terms>(params.q, problem, heads, tile, problem.head_dim, x.q_panels);
  for (int h = 0; h < heads.count; ++h) {
    const int64_t queries = tile.panels * kPanel;
    Zero(x.o_panels + h * kTileQ * problem.head_dim_v, queries * problem.head_dim_v);
    Zero(x.row_sum + h * kTileQ, queries);
    for (int i = 0; i < queries; ++i) x.row_max[h * kTileQ + i] = -kInf;
  }
  if (HasRule(params.rule)) {
    for (int h = 0; h < heads.count; ++h) {
      x.rule.SetQueries(params.rule, heads.b, heads[h], tile, h);
    }
    const Admits admits(problem, params.rule, tile, heads.b, heads.first);
    FwdKeys<Terms, true, true>(x, params, heads, q_tile, tile, &admits);
  } else {
    FwdKeys<Terms, false, false>(x, params, heads, q_tile, tile, nullptr);
    FwdKeys<Terms, true, false>(x, params, heads, q_tile, tile, nullptr);
  }
  Finish(x, params, heads, tile);
}

// ---- launcher ----

inline int FwdHeadsATask(const SpattnFwdParams& params, int32_t workers) {
  const SpattnProblem& problem = params.problem;
  constexpr int64_t kRows = 256;  // of q and o, whose tiles are 128 KB then at head_dim 64
  return HeadsATask(params.plan, params.rule, problem.heads, params.plan.tile_q, kRows,
                    problem.batch * problem.heads * QTilesWithRows(problem, params.plan), workers);
}

inline int64_t FwdScratchBytes(const SpattnFwdParams& params, int heads) {
  Arena arena(nullptr);
  FwdScratch scratch(&arena, params.problem, HasRule(params.rule), heads);
  return arena.used();
}

inline int64_t FwdWorkspace(const SpattnFwdParams& params, int32_t workers) {
  return FwdScratchBytes(params, FwdHeadsATask(params, workers)) * Max(workers, 1);
}

inline void Fwd(const SpattnFwdParams& params, const SpattnThreads& threads, void* workspace) {
  const SpattnProblem& problem = params.problem;
  const int64_t q_tiles = QTilesWithRows(problem, params.plan);
  const int count = FwdHeadsATask(params, threads.workers);
  const int64_t groups = problem.heads / count;
  const int64_t scratch_bytes = FwdScratchBytes(params, count);
  ParallelFor(threads, problem.batch * groups * q_tiles, [&](int64_t task, int32_t worker) {
    const int64_t b = task / groups / q_tiles, q_tile = q_tiles - 1 - task / groups % q_tiles;
    const Heads heads = {b, task % groups * count, 1, count};
    Arena arena(static_cast<char*>(workspace) + worker * scratch_bytes);
    const FwdScratch scratch(&arena, problem, HasRule(params.rule), count);
    WithTermsOf(problem.dtype,
                [&](auto terms) { FwdTask<decltype(terms)>(scratch, params, heads, q_tile); });
  });
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_ATTENTION_FWD_H_
