// attention_bwd.h — block-sparse attention on the CPU, backward in one pass over the scores.
//
// Math, with p_ij = exp(s_ij - lse_i), masked p_ij = 0:
//   delta_i = sum_d do_id o_id - dlse_i     dp_ij = <do_i, v_j>     ds_ij = p_ij (dp_ij - delta_i)
//   dq_i = softmax_scale sum_j ds_ij k_j    dk_j = softmax_scale sum_i ds_ij q_i    dv_j = sum_i p_ij do_i
//
// Mapping: one task per (batch, few kv heads, split). A split is a run of q tiles with about the same
//   number of blocks as the others; the task goes through the q tiles of its split as the forward pass
//   does, for every query head that shares a kv head, owns their dq, and adds to dk and dv sums of its
//   own over the keys that the split reads. Where no two splits read the same key (`strided`: every
//   q tile is a split), they are dk and dv; otherwise the splits' sums are added in their order. How
//   many splits there are depends on the problem alone, so the result does not depend on the threads.
// Tiles:   of each head, in words of one float or two bfloat16 (terms.h):
//          q, do as rows [kTileQ, ld] and as panels [panels][dim, kPanel]     k, v [kTileKV, dim]
//          p, ds [panels][kTileKV, kPanel], one head at a time     dq_panels [panels][head_dim, kPanel]
// Stages:  per key tile: load | s = k q | p | dp = v do | ds | dq += k ds | dv += p do | dk += ds q
// Memory:  workspace: two tiles of scores a worker, and float32 dk, dv sums: of the present task for
//          each worker where splits are apart or one, else of all tasks (batch * kv_heads < kMinTasks)
// Cost:    10 * tile_q * block_size * head_dim FLOP per computed block (five matmuls)
// Numerics: as the forward pass; lse is read in nats.
// After:   Dao et al. 2022 (arXiv:2205.14135), algorithm 4, with queries outside.
#ifndef SPARSE_ATTENTION_CPU_ATTENTION_BWD_H_
#define SPARSE_ATTENTION_CPU_ATTENTION_BWD_H_

#include "cpu/attention_fwd.h"
#include "cpu/splits.h"

namespace spattn {
namespace SPATTN_ISA {

// ---- scratch ----

// float32 sums of dk and dv over the kv positions [begin, end); ld_k, ld_v as the q rows have them.
struct KvSums {
  int64_t begin, end;
  int64_t store_begin, store_end;  // splits that are apart: between them they cover all positions
  float *dk, *dv;
  double* bias;  // [2 * bias_reach - 1] of the query head at work, or null
};

struct BwdScratch {
  int64_t ld, ld_v;               // head_dim and head_dim_v, rounded up to panels
  float *q_rows, *do_rows;        // [heads][kTileQ, ld], words
  float *q_columns, *do_columns;  // the same as columns
  float *q_panels, *do_panels;    // [heads][kMaxPanels][dim, kPanel], words
  float* dq_panels;               // [heads][kMaxPanels][dim, kPanel]
  float *lse_log2, *delta;        // [heads][kTileQ]; lse in base 2, +inf where p must be 0
  float *k, *v, *k_columns;       // [heads][kTileKV, dim], words; k_columns: of one head
  float* p;                       // [kTileKV, kPanel] of one panel
  float *p_rows, *ds_rows;        // [kMaxPanels][kTileKV, kPanel], words
  float* ds_columns;              // the same as columns
  KeyTile* keys;
  Leaks key_leaks, q_leaks[kMaxTaskHeads], do_leaks[kMaxTaskHeads];
  RuleScratch rule;

  BwdScratch(Arena* arena, const SpattnProblem& problem, bool has_rule, int heads) {
    const int64_t widest = Max(problem.head_dim, problem.head_dim_v);
    const int64_t scores = kMaxPanels * kTileKV * kPanel, queries = heads * kTileQ;
    ld = RoundUp(problem.head_dim, kPanel);
    ld_v = RoundUp(problem.head_dim_v, kPanel);
    q_rows = arena->Take<float>(queries * ld);
    do_rows = arena->Take<float>(queries * ld_v);
    q_panels = arena->Take<float>(queries * problem.head_dim);
    do_panels = arena->Take<float>(queries * problem.head_dim_v);
    dq_panels = arena->Take<float>(queries * widest);
    lse_log2 = arena->Take<float>(queries);
    delta = arena->Take<float>(queries);
    k = arena->Take<float>(heads * kTileKV * problem.head_dim);
    v = arena->Take<float>(heads * kTileKV * problem.head_dim_v);
    p_rows = arena->Take<float>(scores);
    ds_rows = arena->Take<float>(scores);
    p = p_rows;
    q_columns = do_columns = k_columns = ds_columns = nullptr;
    if (kHasPairs) {
      p = arena->Take<float>(kTileKV * kPanel);
      q_columns = arena->Take<float>(queries * ld);
      do_columns = arena->Take<float>(queries * ld_v);
      k_columns = arena->Take<float>(kTileKV * problem.head_dim);
      ds_columns = arena->Take<float>(scores);
    }
    keys = arena->Take<KeyTile>(1);
    const Leaks leaks(arena->Take<float>(widest));
    key_leaks = leaks;
    for (int h = 0; h < kMaxTaskHeads; ++h) q_leaks[h] = do_leaks[h] = leaks;
    if (has_rule) rule = RuleScratch(arena, heads);
  }

  template <class Terms>
  float* DsColumns() const {
    return Terms::kTerms == 1 ? ds_rows : ds_columns;
  }
};

// Words of a key's scores in one panel, and of a panel's scores.
template <class Terms>
constexpr int kRowWords = kPanel / Terms::kTerms;
template <class Terms>
constexpr int kScoreWords = kTileKV * kRowWords<Terms>;

// The places of one head's tiles.
template <class Terms>
struct HeadTiles {
  float *q_rows, *do_rows, *q_columns, *do_columns, *q_panels, *do_panels, *dq_panels;
  float *lse_log2, *delta;

  HeadTiles(const BwdScratch& x, const SpattnProblem& problem, int h) {
    const int64_t queries = h * kTileQ;
    q_rows = x.q_rows + queries * x.ld / Terms::kTerms;
    do_rows = x.do_rows + queries * x.ld_v / Terms::kTerms;
    q_columns = Terms::kTerms == 1 ? q_rows : x.q_columns + queries * x.ld / Terms::kTerms;
    do_columns = Terms::kTerms == 1 ? do_rows : x.do_columns + queries * x.ld_v / Terms::kTerms;
    q_panels = x.q_panels + queries * problem.head_dim / Terms::kTerms;
    do_panels = x.do_panels + queries * problem.head_dim_v / Terms::kTerms;
    dq_panels = x.dq_panels + queries * problem.head_dim;
    lse_log2 = x.lse_log2 + queries;
    delta = x.delta + queries;
  }
};

// ---- stages ----

// delta = sum_d o_d do_d, in the order in which dp is summed: with one key o = v, and ds is exactly 0.
template <class Terms>
inline void ComputeDelta(const float* o_panel, const float* do_panel, int words, float* delta) {
#pragma GCC unroll 2
  for (int n = 0; n < kPanelVecs; ++n) {
    Vec sum{};
    for (int first = 0; first < words; first += kWordsASum) {
      Vec part{};
      for (int word = first; word < words && word < first + kWordsASum; ++word) {
        const int at = word * kPanel + n * kLanes;
        part = Terms::MultiplyAdd(Load(o_panel + at), Load(do_panel + at), part);
      }
      sum += part;
    }
    Store(delta + n * kLanes, sum);
  }
}

// p and ds of the keys that the panel does not read: AddKvGrad's tiles may overlap them.
template <class Terms>
inline void ZeroUnread(const BwdScratch& x, int panel) {
  const KeyRange read = x.keys->read[panel];
  float* const scores[] = {x.p_rows, x.ds_rows};
  for (float* rows : scores) {
    rows += panel * kScoreWords<Terms>;
    Zero(rows, read.begin * kRowWords<Terms>);
    Zero(rows + read.end * kRowWords<Terms>, (x.keys->count - read.end) * kRowWords<Terms>);
  }
}

// p[j] = 2^(softmax_scale_log2 * k_j q - lse_log2), 0 where not attended
template <class Terms, bool kMasked>
SPATTN_STAGE void RecomputeP(const float* k, const float* q_panel, const float* lse_log2, int words,
                             KeyRange read, float softmax_scale_log2, const uint32_t* attends,
                             float* p) {
  const auto matmul = [&](int j, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    const auto acc = RowProducts<Terms, kRows>(k + j * words, words, q_panel, words);
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVecs; ++n) {
      const Vec lse = Load(lse_log2 + n * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        Vec p_rn = Exp2(acc.v[r][n] * softmax_scale_log2 - lse);
        if (kMasked) p_rn = Select(LanesOfBits(attends[j + r] >> (n * kLanes)), p_rn, Vec{});
        Store(p + (j + r) * kPanel + n * kLanes, p_rn);
      }
    }
  };
  ForRowTiles(read.end, matmul, read.begin);
}

// s[j], the scores under a rule, become p[j] = 2^(s[j] - lse_log2), 0 where not attended.
inline void ExpOfScores(KeyRange read, const float* lse_log2, const uint32_t* attends, float* s) {
  for (int j = read.begin; j < read.end; ++j) {
    for (int n = 0; n < kPanelVecs; ++n) {
      float* at = s + j * kPanel + n * kLanes;
      const Vec p = Exp2(Load(at) - Load(lse_log2 + n * kLanes));
      Store(at, Select(LanesOfBits(attends[j] >> (n * kLanes)), p, Vec{}));
    }
  }
}

// ds[j] = p[j] * (v_j do - delta), 0 where not attended; ds and p as the words that products read. Under
// a rule v_j do and the p for products are what dropout leaves of them, and ds is that of the scores
// before the rule.
template <class Terms, bool kMasked, class Rule>
SPATTN_STAGE void ComputeDs(const float* v, const float* do_panel, const float* delta, int words,
                            KeyRange read, const uint32_t* attends, const Rule& rule,
                            const float* p, float* p_rows, float* ds_rows, float* ds_columns) {
  constexpr int kTerms = Terms::kTerms;
  const auto matmul = [&](int j, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    auto ds = RowProducts<Terms, kRows>(v + j * words, words, do_panel, words);
#pragma GCC unroll 2
    for (int n = 0; n < kPanelVecs; ++n) {
      const Vec delta_n = Load(delta + n * kLanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const Vec dp = rule.Drop(ds.v[r][n], j + r, n);
        Vec ds_rn = Load(p + (j + r) * kPanel + n * kLanes) * (dp - delta_n);
        if (kMasked) ds_rn = Select(LanesOfBits(attends[j + r] >> (n * kLanes)), ds_rn, Vec{});
        ds.v[r][n] = rule.ScoreGradient(ds_rn, j + r, n);
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      Terms::StoreRow(ds.v[r][0], ds.v[r][1], ds_rows + (j + r) * kRowWords<Terms>);
      if (kTerms == 1 && !Rule::kChangesWeights) continue;  // p_rows is p, ds_columns is ds_rows
      const float* p_r = p + (j + r) * kPanel;
      Terms::StoreRow(rule.Drop(Load(p_r), j + r, 0), rule.Drop(Load(p_r + kLanes), j + r, 1),
                      p_rows + (j + r) * kRowWords<Terms>);
    }
#pragma GCC unroll 16
    for (int r = 0; kTerms > 1 && r < kRows; r += kTerms) {
#pragma GCC unroll 2
      for (int n = 0; n < kPanelVecs; ++n) {
        const Vec rows[2] = {ds.v[r][n], r + 1 < kRows ? ds.v[r + 1][n] : Vec{}};
        Store(ds_columns + (j + r) / kTerms * kPanel + n * kLanes, Terms::Column(rows));
      }
    }
  };
  ForRowTiles(read.end, matmul, read.begin);
}

// dq_panel [head_dim, kPanel] += k^T ds
template <class Terms>
SPATTN_STAGE void AddDq(const float* k_columns, const float* ds_columns, int head_dim,
                        KeyRange read, float* dq_panel) {
  const int begin = read.begin / Terms::kTerms;
  const int end = static_cast<int>(CeilDiv(read.end, Terms::kTerms));
  ForRowTiles(head_dim, [&](int d, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    RegisterTile<kRows> acc = LoadTile<kRows>(dq_panel + d * kPanel);
    MultiplyAdd<Terms, kColMajor>(acc, k_columns + begin * head_dim + d, head_dim,
                                  ds_columns + begin * kPanel, kPanel, end - begin);
    StoreTile(acc, dq_panel + d * kPanel);
  });
}

// sums[position of key j - begin] += sum_i weights[i][j] rows[i]: dv from p and do, dk from ds and q
template <class Terms>
SPATTN_STAGE void AddKvGrad(const KeyTile& keys, int panels, const float* weights,
                            const float* columns, int64_t ld, int64_t begin, float* sums) {
  constexpr int kWords = kRowWords<Terms>;
  for (int64_t d = 0; d < ld;
       d += kPanel) {  // outside: a slice of the columns stays in the L1 cache
    ForRowTiles(keys.count, [&](int j, auto height) {
      constexpr int kRows = decltype(height)::kRows;
      auto acc = ZeroTile<kRows>();
      for (int panel = 0; panel < panels; ++panel) {
        const KeyRange read = keys.read[panel];
        if (j >= read.end || j + kRows <= read.begin) continue;
        MultiplyAdd<Terms, kRowMajor>(acc, weights + panel * kScoreWords<Terms> + j * kWords,
                                      kWords, columns + panel * kWords * ld + d, ld, kWords);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        float* sum = sums + (keys.positions[j + r] - begin) * ld + d;
#pragma GCC unroll 2
        for (int n = 0; n < kPanelVecs; ++n) {
          Store(sum + n * kLanes, Load(sum + n * kLanes) + acc.v[r][n]);
        }
      }
    });
  }
}

// sums[key] += weights[i][key] * row for the keys that query i attends to
template <class Terms>
inline void AddToKeys(const KeyTile& keys, int i, const float* weights, const float* row, int dim,
                      int64_t ld, int64_t begin, float* sums) {
  const int panel = i / kPanel, lane = i % kPanel;
  for (int j = 0; j < keys.count; ++j) {
    if (!(keys.attends[panel][j] >> lane & 1)) continue;
    const float weight =
        Terms::TermOfRow(weights + panel * kScoreWords<Terms> + j * kRowWords<Terms>, lane);
    float* sum = sums + (keys.positions[j] - begin) * ld;
    for (int d = 0; d < dim; ++d) sum[d] += weight * row[d];
  }
}

// ---- kernel ----

template <class Terms>
inline void LoadQTile(const BwdScratch& x, const SpattnBwdParams& params, const Heads& heads,
                      const QTile& tile) {
  const SpattnProblem& problem = params.problem;
  const int head_dim = problem.head_dim, head_dim_v = problem.head_dim_v;
  const int words = head_dim / Terms::kTerms, words_v = head_dim_v / Terms::kTerms;
  const int64_t ld = x.ld / Terms::kTerms, ld_v = x.ld_v / Terms::kTerms;
  float* o_panels = x.dq_panels;  // not in use yet
  LoadQPanels<Terms>(params.o, problem, heads, tile, head_dim_v, o_panels);
  LoadQRows<Terms>(params.dout, problem, heads, tile, head_dim_v, ld_v, x.do_rows);
  LoadQRows<Terms>(params.q, problem, heads, tile, head_dim, ld, x.q_rows);
  for (int h = 0; h < heads.count; ++h) {
    const HeadTiles<Terms> head(x, problem, h);
    Terms::Columns(head.q_rows, tile.panels * kPanel, ld, head.q_columns);
    Terms::Columns(head.do_rows, tile.panels * kPanel, ld_v, head.do_columns);
    RowsToPanels(head.q_rows, tile.panels, words, ld, head.q_panels);
    RowsToPanels(head.do_rows, tile.panels, words_v, ld_v, head.do_panels);
    for (int panel = 0; panel < tile.panels; ++panel) {
      const float* o_panel = o_panels + (h * kMaxPanels + panel) * kPanel * words_v;
      ComputeDelta<Terms>(o_panel, head.do_panels + panel * kPanel * words_v, words_v,
                          head.delta + panel * kPanel);
    }
    const int64_t first = (heads.b * problem.heads + heads[h]) * problem.q_len;
    for (int i = 0; i < tile.panels * kPanel; ++i) {
      const int64_t row = tile.rows[i];
      const bool has_keys = row >= 0 && params.lse[first + row] != -kInf;
      head.lse_log2[i] = has_keys ? params.lse[first + row] * kLog2E : kInf;
      if (has_keys && params.dlse) head.delta[i] -= params.dlse[first + row];
    }
  }
}

// Adds what was taken out of the products of a PARTIAL tile, for head h.
template <class Terms>
inline void AddLeaks(const BwdScratch& x, const SpattnBwdParams& params, const Heads& heads,
                     const Heads& kv_heads, int h, const QTile& tile, const KvSums& sums) {
  const SpattnProblem& problem = params.problem;
  const KeyTile& keys = *x.keys;
  const int head_dim = problem.head_dim, head_dim_v = problem.head_dim_v;
  const Leaks &key_leaks = x.key_leaks, &q_leaks = x.q_leaks[h], &do_leaks = x.do_leaks[h];
  for (int n = 0; n < key_leaks.count; ++n) {
    const int j = key_leaks.index[n];
    const float* row =
        key_leaks.Row(params.k, problem, heads.b, kv_heads[h], keys.rows[j], head_dim);
    for (int panel = 0; panel < tile.panels; ++panel) {
      const float* ds = x.DsColumns<Terms>() + panel * kScoreWords<Terms>;
      AddToPanel(
          row, head_dim, [&](int i) { return Terms::TermOfColumns(ds, kPanel, j, i); },
          keys.attends[panel][j],
          HeadTiles<Terms>(x, problem, h).dq_panels + panel * kPanel * head_dim);
    }
  }
  for (int n = 0; n < do_leaks.count; ++n) {
    const int i = do_leaks.index[n];
    const float* row =
        do_leaks.Row(params.dout, problem, heads.b, heads[h], tile.rows[i], head_dim_v);
    AddToKeys<Terms>(keys, i, x.p_rows, row, head_dim_v, x.ld_v, sums.begin, sums.dv);
  }
  for (int n = 0; n < q_leaks.count; ++n) {
    const int i = q_leaks.index[n];
    const float* row = q_leaks.Row(params.q, problem, heads.b, heads[h], tile.rows[i], head_dim);
    AddToKeys<Terms>(keys, i, x.ds_rows, row, head_dim, x.ld, sums.begin, sums.dk);
  }
}

// Works on one key tile for head h.
template <class Terms, bool kMasked, bool kHasRule>
inline void BwdTile(BwdScratch& x, const SpattnBwdParams& params, const Heads& heads,
                    const Heads& kv_heads, int h, const QTile& tile, const KvSums& sums) {
  const SpattnProblem& problem = params.problem;
  const int head_dim = problem.head_dim;
  const int words = head_dim / Terms::kTerms, words_v = problem.head_dim_v / Terms::kTerms;
  const float scale_log2 = problem.softmax_scale * kLog2E;
  const KeyTile& keys = *x.keys;
  const HeadTiles<Terms> head(x, problem, h);
  float *k = x.k + h * kTileKV * words, *v = x.v + h * kTileKV * words_v;
  float* ds_columns = x.DsColumns<Terms>();
  if (kHasRule) x.rule.SetKeys(params.rule, heads.b, heads[h], keys);
  for (int panel = 0; panel < tile.panels; ++panel) {
    const KeyRange read = keys.read[panel];
    const uint32_t* attends = keys.attends[panel];
    const int64_t scores = panel * kScoreWords<Terms>;
    float* p = Terms::kTerms == 1 ? x.p_rows + scores : x.p;
    const float* q_panel = head.q_panels + panel * kPanel * words;
    const float* lse_log2 = head.lse_log2 + panel * kPanel;
    const auto compute_ds = [&](const auto& rule) {
      ComputeDs<Terms, kMasked>(v, head.do_panels + panel * kPanel * words_v,
                                head.delta + panel * kPanel, words_v, read, attends, rule, p,
                                x.p_rows + scores, x.ds_rows + scores, ds_columns + scores);
    };
    if (kMasked) ZeroUnread<Terms>(x, panel);
    const auto recompute_p = [&] {
      RecomputeP<Terms, kMasked>(k, q_panel, lse_log2, words, read, scale_log2, attends, p);
    };
    if constexpr (kHasRule) {
      const PanelRule rule(params.rule, x.rule, heads[h], h, tile, panel, keys, sums.bias);
      if (rule.ChangesScores()) {
        MatmulQK<Terms, kMasked>(k, q_panel, head_dim, read, scale_log2, attends, p);
        rule.Apply<true>(read, attends, p);
        ExpOfScores(read, lse_log2, attends, p);
      } else {
        recompute_p();
      }
      compute_ds(rule);
    } else {
      recompute_p();
      compute_ds(NoRule());
    }
  }
  if (kMasked) x.key_leaks.TakeOut<Terms>(k, keys.count, head_dim, words);
  const float* k_columns = Terms::Columns(k, keys.count, words, x.k_columns);
  for (int panel = 0; panel < tile.panels; ++panel) {
    AddDq<Terms>(k_columns, ds_columns + panel * kScoreWords<Terms>, head_dim, keys.read[panel],
                 head.dq_panels + panel * kPanel * head_dim);
  }
  AddKvGrad<Terms>(keys, tile.panels, x.p_rows, head.do_columns, x.ld_v, sums.begin, sums.dv);
  AddKvGrad<Terms>(keys, tile.panels, x.ds_rows, head.q_columns, x.ld, sums.begin, sums.dk);
  if (kMasked) AddLeaks<Terms>(x, params, heads, kv_heads, h, tile, sums);
}

template <class Terms, bool kMasked, bool kHasRule>
inline void BwdKeys(BwdScratch& x, const SpattnBwdParams& params, const Heads& heads,
                    const Heads& kv_heads, int64_t q_tile, const QTile& tile, const Admits* admits,
                    const KvSums* sums) {
  const SpattnProblem& problem = params.problem;
  for (int h = 0; kMasked && h < heads.count; ++h) {
    const HeadTiles<Terms> head(x, problem, h);
    const auto take_out = [&](Leaks* leaks, float* rows, int dim, int64_t ld, float* columns) {
      const int queries = tile.panels * kPanel;
      leaks->TakeOut<Terms>(rows, queries, dim, ld);
      if (leaks->count > 0) Terms::Columns(rows, queries, ld, columns);
    };
    take_out(&x.q_leaks[h], head.q_rows, problem.head_dim, x.ld / Terms::kTerms, head.q_columns);
    take_out(&x.do_leaks[h], head.do_rows, problem.head_dim_v, x.ld_v / Terms::kTerms,
             head.do_columns);
  }
  KeyWalk<kMasked> walk(problem, params.plan, params.plan.heads == 1 ? 0 : heads.first, q_tile,
                        heads.b, admits);
  while (walk.Next(x.keys)) {
    LoadKeys<Terms>(params.k, problem, kv_heads, *x.keys, problem.head_dim, x.k);
    LoadKeys<Terms>(params.v, problem, kv_heads, *x.keys, problem.head_dim_v, x.v);
    for (int h = 0; h < heads.count; ++h) {
      BwdTile<Terms, kMasked, kHasRule>(x, params, heads, kv_heads, h, tile, sums[h]);
    }
  }
}

template <class Terms>
inline void BwdQTile(BwdScratch& x, const SpattnBwdParams& params, const Heads& heads,
                     const Heads& kv_heads, int64_t q_tile, const KvSums* sums) {
  const SpattnProblem& problem = params.problem;
  const QTile tile(problem, params.plan, q_tile);
  LoadQTile<Terms>(x, params, heads, tile);
  for (int h = 0; h < heads.count; ++h) {
    Zero(x.dq_panels + h * kTileQ * problem.head_dim, tile.panels * kPanel * problem.head_dim);
  }
  if (HasRule(params.rule)) {
    for (int h = 0; h < heads.count; ++h) {
      x.rule.SetQueries(params.rule, heads.b, heads[h], tile, h);
    }
    const Admits admits(problem, params.rule, tile, heads.b, heads.first);
    BwdKeys<Terms, true, true>(x, params, heads, kv_heads, q_tile, tile, &admits, sums);
  } else {
    BwdKeys<Terms, false, false>(x, params, heads, kv_heads, q_tile, tile, nullptr, sums);
    BwdKeys<Terms, true, false>(x, params, heads, kv_heads, q_tile, tile, nullptr, sums);
  }
  const auto scale = [&](int, int) { return problem.softmax_scale; };
  StoreQPanels(x.dq_panels, scale, problem, heads, tile, problem.head_dim, params.dq);
}

// dk and dv at the kv positions [begin, end): the splits' sums [heads][splits], added in their order.
inline void StoreKvGrad(const SpattnBwdParams& params, const Heads& kv_heads, const KvSums* sums,
                        int64_t splits, int64_t begin, int64_t end) {
  const SpattnProblem& problem = params.problem;
  const auto store = [&](const SpattnTensor& t, float* KvSums::* part, int dim, float scale,
                         int64_t position, int64_t to) {
    const int64_t ld = RoundUp(dim, kPanel);
    for (int h = 0; h < kv_heads.count; ++h) {
      float row[kMaxHeadDim];
      Zero(row, dim);
      for (const KvSums* sum = sums + h * splits; sum < sums + (h + 1) * splits; ++sum) {
        if (position < sum->begin || position >= sum->end) continue;
        const float* from = sum->*part + (position - sum->begin) * ld;
        for (int d = 0; d < dim; d += kRowLanes) {
          StoreAs(row + d, LoadAs<RowVec>(row + d) + LoadAs<RowVec>(from + d));
        }
      }
      for (int d = 0; d < dim; d += kRowLanes) StoreAs(row + d, LoadAs<RowVec>(row + d) * scale);
      const char* address = RowAddress(t, problem.dtype, kv_heads.b, kv_heads[h], to);
      StoreRow(row, problem.dtype, dim, const_cast<char*>(address));
    }
  };
  const int ahead = RowsAhead(problem, kv_heads, problem.head_dim);
  RowWalk walk(problem.kv_len, problem.row_stride, begin);
  RowWalk fetched(problem.kv_len, problem.row_stride, begin + ahead);
  for (int64_t position = begin; position < end; ++position, walk.Next(), fetched.Next()) {
    if (position + ahead < end) {
      PrefetchRow<true>(params.dk, problem, kv_heads, fetched.row(), problem.head_dim);
      PrefetchRow<true>(params.dv, problem, kv_heads, fetched.row(), problem.head_dim_v);
    }
    const int64_t row = walk.row();
    if (row < 0) continue;
    store(params.dk, &KvSums::dk, problem.head_dim, problem.softmax_scale, position, row);
    store(params.dv, &KvSums::dv, problem.head_dim_v, 1.0f, position, row);
  }
}

// ---- launcher ----

// How the workspace is laid out; built with no base it only counts bytes.
struct BwdWorkspaceLayout {
  Splits splits;
  int task_heads;                      // kv heads a task
  int64_t scratch_bytes, sums_floats;  // of a worker; of a head's sums
  char* scratch;                       // [workers]
  float* worker_sums;                  // [workers, task_heads], where splits are apart
  KvSums* sums;                        // [groups, splits] there, else [batch * kv_heads, splits]
  int64_t biases;                      // 2 * bias_reach - 1 where the bias's gradient is asked for
  double* bias_sums;                   // [batch, heads, splits, biases]
  int64_t bytes;

  BwdWorkspaceLayout(const SpattnBwdParams& params, int32_t threads, void* base) : splits(params) {
    const SpattnProblem& problem = params.problem;
    const int64_t workers = Max(threads, 1);
    const int64_t heads = problem.batch * problem.kv_heads, groups = splits.groups();
    constexpr int64_t kRows = 256;  // of q, do, dq, whose tiles are 160 KB then at head_dim 64
    task_heads = HeadsATask(params.plan, params.rule, problem.kv_heads, params.plan.tile_q, kRows,
                            heads * splits.count(), workers);
    Arena sizes(nullptr), arena(base);
    const BwdScratch scratch_sizes(&sizes, problem, HasRule(params.rule), task_heads);
    scratch_bytes = sizes.used();
    sums_floats = 0;
    const int64_t ld = scratch_sizes.ld, ld_v = scratch_sizes.ld_v;
    scratch = arena.Take<char>(workers * scratch_bytes);
    sums = arena.Take<KvSums>((splits.are_apart() ? groups : heads) * splits.count());
    for (int64_t group = 0; group < groups; ++group) {
      int64_t past = 0;
      for (int64_t s = 0; s < splits.count(); ++s) {
        KvSums range = {};
        splits.KvRange(group, s, &range.begin, &range.end);
        range.store_begin = past;
        past = Max(past, range.end);
        range.store_end =
            s + 1 == splits.count() ? splits.kv_blocks() * params.plan.block_size : past;
        const int64_t length = range.end - range.begin;
        sums_floats = Max(sums_floats, length * (ld + ld_v));
        if (splits.are_apart()) {
          if (base) sums[group * splits.count() + s] = range;
          continue;
        }
        for (int64_t head = group; head < heads; head += groups) {
          range.dk = arena.Take<float>(length * ld);
          range.dv = arena.Take<float>(length * ld_v);
          if (base) sums[head * splits.count() + s] = range;
        }
      }
    }
    const bool has_bias_gradient = params.drelative_bias && problem.q_len > 0;  // not all 0
    biases = has_bias_gradient ? 2 * params.rule.bias_reach - 1 : 0;
    bias_sums = arena.Take<double>(problem.batch * problem.heads * splits.count() * biases);
    worker_sums =
        splits.are_apart() ? arena.Take<float>(workers * task_heads * sums_floats) : nullptr;
    bytes = arena.used();
  }

  double* BiasSums(const SpattnBwdParams& params, const Heads& heads, int h, int64_t split) const {
    if (biases == 0) return nullptr;
    const int64_t head = heads.b * params.problem.heads + heads[h];
    return bias_sums + (head * splits.count() + split) * biases;
  }
};

// The bias's gradient: the sums of batch elements, heads and splits, added in their order.
inline void StoreBiasGradient(const BwdWorkspaceLayout& layout, const SpattnBwdParams& params,
                              int64_t begin, int64_t end) {
  const SpattnProblem& problem = params.problem;
  const int64_t splits = layout.splits.count(), width = layout.biases;
  const int64_t heads_a_row = problem.heads / params.rule.bias_heads;
  for (int64_t at = begin; at < end; ++at) {
    const int64_t first = at / width * heads_a_row;
    double sum = 0;
    for (int64_t b = 0; b < problem.batch; ++b) {
      for (int64_t i = 0; i < heads_a_row * splits; ++i) {
        sum += layout.bias_sums[((b * problem.heads + first) * splits + i) * width + at % width];
      }
    }
    params.drelative_bias[at] = static_cast<float>(sum);
  }
}

inline int64_t BwdWorkspace(const SpattnBwdParams& params, int32_t workers) {
  return BwdWorkspaceLayout(params, workers, nullptr).bytes;
}

// Works on split s of kv_heads.
template <class Terms>
inline void BwdTask(const BwdWorkspaceLayout& layout, const SpattnBwdParams& params,
                    const Heads& kv_heads, int64_t s, int32_t worker) {
  const SpattnProblem& problem = params.problem;
  const Splits& splits = layout.splits;
  Arena arena(layout.scratch + worker * layout.scratch_bytes);
  BwdScratch scratch(&arena, problem, HasRule(params.rule), kv_heads.count);
  KvSums sums[kMaxTaskHeads];
  for (int h = 0; h < kv_heads.count; ++h) {
    const int64_t kv_head = splits.are_apart() ? (splits.groups() == 1 ? 0 : kv_heads[h])
                                               : kv_heads.b * problem.kv_heads + kv_heads[h];
    sums[h] = layout.sums[kv_head * splits.count() + s];
    const int64_t length = sums[h].end - sums[h].begin;
    if (splits.are_apart()) {
      sums[h].dk = layout.worker_sums + (worker * layout.task_heads + h) * layout.sums_floats;
      sums[h].dv = sums[h].dk + length * scratch.ld;
    }
    Zero(sums[h].dk, length * scratch.ld);
    Zero(sums[h].dv, length * scratch.ld_v);
  }
  const int64_t group = problem.heads / problem.kv_heads;
  for (int64_t i = 0; i < group; ++i) {
    const Heads heads = {kv_heads.b, kv_heads.first * group + i, group, kv_heads.count};
    for (int h = 0; h < heads.count; ++h) sums[h].bias = layout.BiasSums(params, heads, h, s);
    const int64_t plan_head = splits.PlanHead(heads.first);
    const int64_t end = splits.FirstQTile(plan_head, s + 1);
    for (int64_t q_tile = splits.FirstQTile(plan_head, s); q_tile < end; ++q_tile) {
      BwdQTile<Terms>(scratch, params, heads, kv_heads, q_tile, sums);
    }
  }
  if (splits.are_apart()) {
    StoreKvGrad(params, kv_heads, sums, 1, sums[0].store_begin, sums[0].store_end);
  }
}

inline void Bwd(const SpattnBwdParams& params, const SpattnThreads& threads, void* workspace) {
  const SpattnProblem& problem = params.problem;
  if (problem.q_len == 0 && params.drelative_bias) {
    Zero(params.drelative_bias, params.rule.bias_heads * (2 * params.rule.bias_reach - 1));
  }
  if (problem.q_len == 0 && problem.kv_len == 0) return;  // however many sequences
  const BwdWorkspaceLayout layout(params, threads.workers, workspace);
  const int64_t bias_sums = problem.batch * problem.heads * layout.splits.count() * layout.biases;
  for (int64_t i = 0; i < bias_sums; ++i) layout.bias_sums[i] = 0;
  const int64_t count = layout.splits.count(), groups = problem.kv_heads / layout.task_heads;

  ParallelFor(threads, problem.batch * groups * count, [&](int64_t task, int32_t worker) {
    const Heads kv_heads = {task / groups / count, task % groups * layout.task_heads, 1,
                            layout.task_heads};
    WithTermsOf(problem.dtype, [&](auto terms) {
      BwdTask<decltype(terms)>(layout, params, kv_heads, task / groups % count, worker);
    });
  });
  const int64_t biases = params.rule.bias_heads * layout.biases;
  constexpr int64_t kBiases = 256;  // of a task
  ParallelFor(threads, CeilDiv(biases, kBiases), [&](int64_t task, int32_t) {
    StoreBiasGradient(layout, params, task * kBiases, Min((task + 1) * kBiases, biases));
  });
  if (layout.splits.are_apart()) return;

  const int64_t positions = layout.splits.kv_blocks() * params.plan.block_size;
  constexpr int64_t kPositions = 256;  // of a task
  const int64_t chunks = CeilDiv(positions, kPositions);
  ParallelFor(threads, problem.batch * problem.kv_heads * chunks, [&](int64_t task, int32_t) {
    const int64_t head = task / chunks, begin = task % chunks * kPositions;
    StoreKvGrad(params, {head / problem.kv_heads, head % problem.kv_heads, 1, 1},
                layout.sums + head * count, count, begin, Min(begin + kPositions, positions));
  });
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_ATTENTION_BWD_H_
