// attention_bwd.h — block-sparse attention on the CPU, backward in one pass over the scores.
//
// Math, with p_ij = exp(s_ij - lse_i), masked p_ij = 0:
//   delta_i = sum_d do_id o_id - dlse_i     dp_ij = <do_i, v_j>     ds_ij = p_ij (dp_ij - delta_i)
//   dq_i = softmax_scale sum_j ds_ij k_j    dk_j = softmax_scale sum_i ds_ij q_i    dv_j = sum_i p_ij do_i
//
// Mapping: one task per (batch, kv head, split). A split is a run of q tiles with about the same number
//   of blocks as the others; the task goes through the q tiles of its split as the forward pass
//   does, for every query head that shares the kv head, owns their dq, and adds to dk and dv sums of its
//   own over the keys that the split reads. Where no two splits read the same key (`strided`: every
//   q tile is a split), they are dk and dv; otherwise the splits' sums are added in their order. How
//   many splits there are depends on the problem alone, so the result does not depend on the threads.
// Tiles:   q, do as rows [kTileQ, ld] and as panels [panels][dim, kPanel]     k, v [kTileKV, dim]
//          p, ds [panels][kTileKV, kPanel]     dq_panels [panels][head_dim, kPanel]
// Stages:  per key tile: load | s = k q | p | dp = v do | ds | dq += k ds | dv += p do | dk += ds q
// Memory:  workspace: two tiles of scores a worker, and float32 dk, dv sums: of the present task for
//          each worker where splits are apart or one, else of all tasks (batch * kv_heads < kMinTasks)
// Cost:    10 * block_q * block_kv * head_dim FLOP per computed block (five matmuls)
// Numerics: as the forward pass; lse is read in nats.
// After:   Dao et al. 2022 (arXiv:2205.14135), algorithm 4, with queries outside.
#ifndef SPARSE_ATTENTION_CPU_ATTENTION_BWD_H_
#define SPARSE_ATTENTION_CPU_ATTENTION_BWD_H_

#include "attention_fwd.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr int64_t kMinTasks =
    16;  // split the queries of a head where there are fewer heads than this

// ---- splits ----

// The runs of q tiles and, for each, the kv positions its dk and dv sums cover.
class Splits {
 public:
  explicit Splits(const SpattnBwdParams& params)
      : problem_(params.problem), plan_(params.plan), group_(problem_.heads / problem_.kv_heads) {
    const int64_t heads = problem_.batch * problem_.kv_heads;
    count_ = plan_.q_tiles;
    if (AreApart()) return;
    count_ = heads > 0 ? Max(Min(CeilDiv(kMinTasks, heads), plan_.q_tiles), 1) : 1;
    are_apart_ = count_ == 1;
  }

  int64_t count() const { return count_; }
  bool are_apart() const { return are_apart_; }

  // Kv heads that may read different keys.
  int64_t groups() const { return plan_.heads == 1 ? 1 : problem_.kv_heads; }

  // First q tile of split s: where s / count of the head's blocks lie before it.
  int64_t FirstQTile(int64_t plan_head, int64_t s) const {
    const int32_t* indptr = plan_.kv_indptr + plan_head * plan_.q_tiles;
    const int64_t blocks = indptr[plan_.q_tiles] - indptr[0];
    const int64_t target = indptr[0] + blocks * s / count_;
    if (s == count_) return plan_.q_tiles;
    int64_t low = 0, high = plan_.q_tiles;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (indptr[middle] < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  int64_t PlanHead(int64_t head) const { return plan_.heads == 1 ? 0 : head; }

  // Positions [*begin, *end) of the keys that split s of kv_head may read.
  void KvRange(int64_t kv_head, int64_t s, int64_t* begin, int64_t* end) const {
    int64_t first = plan_.kv_blocks, last = -1;
    for (int64_t head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
      const int32_t* indptr = plan_.kv_indptr + PlanHead(head) * plan_.q_tiles;
      const int64_t tile_end = FirstQTile(PlanHead(head), s + 1);
      for (int64_t tile = FirstQTile(PlanHead(head), s); tile < tile_end; ++tile) {
        if (indptr[tile] == indptr[tile + 1]) continue;  // kv_indices increase within a tile
        first = Min(first, plan_.kv_indices[indptr[tile]]);
        last = Max(last, plan_.kv_indices[indptr[tile + 1] - 1]);
      }
      if (plan_.heads == 1) break;
    }
    *begin = last < 0 ? 0 : first * plan_.block_kv;
    *end = (last + 1) * plan_.block_kv;
  }

 private:
  const SpattnProblem& problem_;
  const SpattnPlan& plan_;
  // Whether each split's keys lie past those of the splits before it.
  bool AreApart() const {
    for (int64_t kv_head = 0; kv_head < groups(); ++kv_head) {
      int64_t past = 0;
      for (int64_t s = 0; s < count_; ++s) {
        int64_t begin, end;
        KvRange(kv_head, s, &begin, &end);
        if (begin < end && begin < past) return false;
        past = Max(past, end);
      }
    }
    return true;
  }

  int64_t group_, count_;
  bool are_apart_ = true;
};

// ---- scratch ----

// float32 sums of dk and dv over the kv positions [begin, end); ld_k, ld_v as the q rows have them.
struct KvSums {
  int64_t begin, end;
  int64_t store_begin, store_end;  // splits that are apart: between them they cover all positions
  float *dk, *dv;
};

struct BwdScratch {
  int64_t ld, ld_v;  // leading dimensions of rows: head_dim and head_dim_v, rounded up to panels
  float *q_rows, *do_rows, *rows, *q_panels, *do_panels, *dq_panels, *k, *v, *p, *ds;
  float *lse_log2, *delta;  // [panels * kPanel]; lse in base 2, +inf where p must be 0
  KeyTile* keys;
  Leaks key_leaks, q_leaks, do_leaks;

  BwdScratch(Arena* arena, const SpattnProblem& problem) {
    const int64_t queries = kMaxPanels * kPanel, scores = kMaxPanels * kTileKV * kPanel;
    ld = RoundUp(problem.head_dim, kPanel);
    ld_v = RoundUp(problem.head_dim_v, kPanel);
    q_rows = arena->Take<float>(queries * ld);
    do_rows = arena->Take<float>(queries * ld_v);
    rows = arena->Take<float>(queries * Max(ld, ld_v));
    q_panels = arena->Take<float>(queries * problem.head_dim);
    do_panels = arena->Take<float>(queries * problem.head_dim_v);
    dq_panels = arena->Take<float>(queries * Max(problem.head_dim, problem.head_dim_v));
    k = arena->Take<float>(kTileKV * problem.head_dim);
    v = arena->Take<float>(kTileKV * problem.head_dim_v);
    p = arena->Take<float>(scores);
    ds = arena->Take<float>(scores);
    lse_log2 = arena->Take<float>(queries);
    delta = arena->Take<float>(queries);
    keys = arena->Take<KeyTile>(1);
    float* row = arena->Take<float>(Max(ld, ld_v));
    key_leaks = q_leaks = do_leaks = Leaks(row);
  }

  float* P(int panel) const { return p + panel * kTileKV * kPanel; }
  float* Ds(int panel) const { return ds + panel * kTileKV * kPanel; }
};

// ---- stages ----

// delta = sum_d o_d do_d, in the order in which dp is summed: with one key o = v, and ds is exactly 0.
inline void ComputeDelta(const float* o_panel, const float* do_panel, int head_dim_v,
                         float* delta) {
  for (int n = 0; n < kPanelVecs; ++n) {
    Vec sum{};
    for (int first = 0; first < head_dim_v; first += kTermsASum) {
      Vec part{};
      for (int d = first; d < head_dim_v && d < first + kTermsASum; ++d) {
        const int at = d * kPanel + n * kLanes;
        part += Load(o_panel + at) * Load(do_panel + at);
      }
      sum += part;
    }
    Store(delta + n * kLanes, sum);
  }
}

// p and ds of the keys that the panel does not read: AddKvGrad's tiles may overlap them.
inline void ZeroUnread(const BwdScratch& x, int count, int panel) {
  const KeyRange read = x.keys->read[panel];
  float* const scores[] = {x.P(panel), x.Ds(panel)};
  for (float* s : scores) {
    Zero(s, read.begin * kPanel);
    Zero(s + read.end * kPanel, (count - read.end) * kPanel);
  }
}

// p[j] = 2^(softmax_scale_log2 * k_j q - lse_log2), 0 where not attended
template <bool kMasked>
inline void RecomputeP(const BwdScratch& x, KeyRange read, int head_dim, int panel,
                       float softmax_scale_log2) {
  const float* q_panel = x.q_panels + panel * head_dim * kPanel;
  float* p = x.P(panel);
  const auto matmul = [&](int j, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    const auto acc = RowProducts<kRows>(x.k + j * head_dim, head_dim, q_panel, head_dim);
    for (int n = 0; n < kPanelVecs; ++n) {
      const Vec lse = Load(x.lse_log2 + panel * kPanel + n * kLanes);
      for (int r = 0; r < kRows; ++r) {
        Vec p_rn = Exp2(acc.v[r][n] * softmax_scale_log2 - lse);
        if (kMasked) {
          const uint32_t attends = x.keys->attends[panel][j + r];
          p_rn = Select(LanesOfBits(attends >> (n * kLanes)), p_rn, Vec{});
        }
        Store(p + (j + r) * kPanel + n * kLanes, p_rn);
      }
    }
  };
  ForRowTiles(read.end, matmul, read.begin);
}

// ds[j] = p[j] * (v_j do - delta), 0 where not attended
template <bool kMasked>
inline void ComputeDs(const BwdScratch& x, KeyRange read, int head_dim_v, int panel) {
  const float* do_panel = x.do_panels + panel * head_dim_v * kPanel;
  const float* p = x.P(panel);
  float* ds = x.Ds(panel);
  const auto matmul = [&](int j, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    const auto acc = RowProducts<kRows>(x.v + j * head_dim_v, head_dim_v, do_panel, head_dim_v);
    for (int n = 0; n < kPanelVecs; ++n) {
      const Vec delta = Load(x.delta + panel * kPanel + n * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (j + r) * kPanel + n * kLanes;
        Vec ds_rn = Load(p + at) * (acc.v[r][n] - delta);
        if (kMasked) {
          const uint32_t attends = x.keys->attends[panel][j + r];
          ds_rn = Select(LanesOfBits(attends >> (n * kLanes)), ds_rn, Vec{});
        }
        Store(ds + at, ds_rn);
      }
    }
  };
  ForRowTiles(read.end, matmul, read.begin);
}

// dq_panel [head_dim, kPanel] += k^T ds
inline void AddDq(const BwdScratch& x, KeyRange read, int head_dim, int panel) {
  float* dq_panel = x.dq_panels + panel * head_dim * kPanel;
  ForRowTiles(head_dim, [&](int d, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    RegisterTile<kRows> acc = LoadTile<kRows>(dq_panel + d * kPanel);
    MultiplyAdd<kColMajor>(acc, x.k + read.begin * head_dim + d, head_dim,
                           x.Ds(panel) + read.begin * kPanel, kPanel, read.count());
    StoreTile(acc, dq_panel + d * kPanel);
  });
}

// sums[position of key j - begin] += sum_i weights[i][j] rows[i]: dv from p and do, dk from ds and q
inline void AddKvGrad(const KeyTile& keys, int panels, const float* weights, const float* rows,
                      int64_t ld, int64_t begin, float* sums) {
  ForRowTiles(keys.count, [&](int j, auto height) {
    constexpr int kRows = decltype(height)::kRows;
    for (int64_t d = 0; d < ld; d += kPanel) {
      auto acc = ZeroTile<kRows>();
      for (int panel = 0; panel < panels; ++panel) {
        const KeyRange read = keys.read[panel];
        if (j >= read.end || j + kRows <= read.begin) continue;
        MultiplyAdd<kRowMajor>(acc, weights + (panel * kTileKV + j) * kPanel, kPanel,
                               rows + panel * kPanel * ld + d, ld, kPanel);
      }
      for (int r = 0; r < kRows; ++r) {
        float* sum = sums + (keys.positions[j + r] - begin) * ld + d;
        for (int n = 0; n < kPanelVecs; ++n) {
          Store(sum + n * kLanes, Load(sum + n * kLanes) + acc.v[r][n]);
        }
      }
    }
  });
}

// sums[key] += weights[i][key] * row for the keys that query i attends to
inline void AddToKeys(const KeyTile& keys, int i, const float* weights, const float* row, int dim,
                      int64_t ld, int64_t begin, float* sums) {
  const int panel = i / kPanel, lane = i % kPanel;
  for (int j = 0; j < keys.count; ++j) {
    if (!(keys.attends[panel][j] >> lane & 1)) continue;
    const float weight = weights[(panel * kTileKV + j) * kPanel + lane];
    float* sum = sums + (keys.positions[j] - begin) * ld;
    for (int d = 0; d < dim; ++d) sum[d] += weight * row[d];
  }
}

// ---- kernel ----

inline void LoadQTile(const BwdScratch& x, const SpattnBwdParams& params, int64_t b, int64_t head,
                      const QTile& tile) {
  const SpattnProblem& problem = params.problem;
  const int head_dim = problem.head_dim, head_dim_v = problem.head_dim_v;
  LoadQRows(params.o, problem, b, head, tile, head_dim_v, x.ld_v, x.rows);
  LoadQRows(params.q, problem, b, head, tile, head_dim, x.ld, x.q_rows);
  LoadQRows(params.dout, problem, b, head, tile, head_dim_v, x.ld_v, x.do_rows);
  RowsToPanels(x.q_rows, tile.panels, head_dim, x.ld, x.q_panels);
  RowsToPanels(x.do_rows, tile.panels, head_dim_v, x.ld_v, x.do_panels);
  float* o_panels = x.dq_panels;  // not in use yet
  RowsToPanels(x.rows, tile.panels, head_dim_v, x.ld_v, o_panels);
  for (int panel = 0; panel < tile.panels; ++panel) {
    ComputeDelta(o_panels + panel * head_dim_v * kPanel, x.do_panels + panel * head_dim_v * kPanel,
                 head_dim_v, x.delta + panel * kPanel);
  }
  const int64_t first = (b * problem.heads + head) * problem.q_len;
  for (int i = 0; i < tile.panels * kPanel; ++i) {
    const int64_t row = tile.rows[i];
    const bool has_keys = row >= 0 && params.lse[first + row] != -kInf;
    x.lse_log2[i] = has_keys ? params.lse[first + row] * kLog2E : kInf;
    if (has_keys && params.dlse) x.delta[i] -= params.dlse[first + row];
  }
}

template <bool kMasked>
inline void BwdKeys(BwdScratch& x, const SpattnBwdParams& params, int64_t b, int64_t head,
                    int64_t q_tile, const QTile& tile, const KvSums& sums) {
  const SpattnProblem& problem = params.problem;
  const int head_dim = problem.head_dim, head_dim_v = problem.head_dim_v;
  const int64_t kv_head = head / (problem.heads / problem.kv_heads);
  if (kMasked) {
    x.q_leaks.TakeOut(x.q_rows, tile.panels * kPanel, head_dim, x.ld);
    x.do_leaks.TakeOut(x.do_rows, tile.panels * kPanel, head_dim_v, x.ld_v);
  }
  KeyWalk<kMasked> walk(problem, params.plan, params.plan.heads == 1 ? 0 : head, q_tile, b);
  KeyTile* keys = x.keys;
  while (walk.Next(keys)) {
    LoadKeys(params.k, problem, b, kv_head, *keys, head_dim, head_dim, x.k);
    LoadKeys(params.v, problem, b, kv_head, *keys, head_dim_v, head_dim_v, x.v);
    for (int panel = 0; panel < tile.panels; ++panel) {
      const KeyRange read = keys->read[panel];
      if (kMasked) ZeroUnread(x, keys->count, panel);
      RecomputeP<kMasked>(x, read, head_dim, panel, problem.softmax_scale * kLog2E);
      ComputeDs<kMasked>(x, read, head_dim_v, panel);
    }
    if (kMasked) x.key_leaks.TakeOut(x.k, keys->count, head_dim, head_dim);
    for (int panel = 0; panel < tile.panels; ++panel) {
      AddDq(x, keys->read[panel], head_dim, panel);
    }
    AddKvGrad(*keys, tile.panels, x.p, x.do_rows, x.ld_v, sums.begin, sums.dv);
    AddKvGrad(*keys, tile.panels, x.ds, x.q_rows, x.ld, sums.begin, sums.dk);
    if (kMasked) {
      for (int n = 0; n < x.key_leaks.count; ++n) {
        const int j = x.key_leaks.index[n];
        const float* row = x.key_leaks.Row(params.k, problem, b, kv_head, keys->rows[j], head_dim);
        for (int panel = 0; panel < tile.panels; ++panel) {
          AddToPanel(row, head_dim, x.Ds(panel) + j * kPanel, keys->attends[panel][j],
                     x.dq_panels + panel * head_dim * kPanel);
        }
      }
      for (int n = 0; n < x.do_leaks.count; ++n) {
        const int i = x.do_leaks.index[n];
        const float* row = x.do_leaks.Row(params.dout, problem, b, head, tile.rows[i], head_dim_v);
        AddToKeys(*keys, i, x.p, row, head_dim_v, x.ld_v, sums.begin, sums.dv);
      }
      for (int n = 0; n < x.q_leaks.count; ++n) {
        const int i = x.q_leaks.index[n];
        const float* row = x.q_leaks.Row(params.q, problem, b, head, tile.rows[i], head_dim);
        AddToKeys(*keys, i, x.ds, row, head_dim, x.ld, sums.begin, sums.dk);
      }
    }
  }
}

inline void BwdQTile(BwdScratch& x, const SpattnBwdParams& params, int64_t b, int64_t head,
                     int64_t q_tile, const KvSums& sums) {
  const SpattnProblem& problem = params.problem;
  const QTile tile(problem, params.plan, q_tile);
  const int64_t dq_size = static_cast<int64_t>(tile.panels) * kPanel * problem.head_dim;
  LoadQTile(x, params, b, head, tile);
  Zero(x.dq_panels, dq_size);
  BwdKeys<false>(x, params, b, head, q_tile, tile, sums);
  BwdKeys<true>(x, params, b, head, q_tile, tile, sums);
  for (int64_t i = 0; i < dq_size; ++i) x.dq_panels[i] *= problem.softmax_scale;
  PanelsToRows(x.dq_panels, tile.panels, problem.head_dim, x.ld, x.rows);
  StoreQRows(x.rows, params.dq, problem, b, head, tile, problem.head_dim, x.ld);
}

// dk and dv at the kv positions [begin, end): the splits' sums, added in their order.
inline void StoreKvGrad(const SpattnBwdParams& params, int64_t b, int64_t kv_head,
                        const KvSums* sums, int64_t splits, int64_t begin, int64_t end, int64_t ld,
                        int64_t ld_v, float* row) {
  const SpattnProblem& problem = params.problem;
  const auto store = [&](const SpattnTensor& t, float* KvSums::* part, int dim, int64_t width,
                         float scale, int64_t position, int64_t to) {
    Zero(row, width);
    for (int64_t s = 0; s < splits; ++s) {
      if (position < sums[s].begin || position >= sums[s].end) continue;
      const float* from = sums[s].*part + (position - sums[s].begin) * width;
      for (int d = 0; d < dim; ++d) row[d] += from[d];
    }
    for (int d = 0; d < dim; ++d) row[d] *= scale;
    const char* address = RowAddress(t, problem.dtype, b, kv_head, to);
    StoreRow(row, problem.dtype, dim, const_cast<char*>(address));
  };
  RowWalk walk(problem.kv_len, problem.row_stride, begin);
  for (int64_t position = begin; position < end; ++position, walk.Next()) {
    if (walk.row() < 0) continue;
    store(params.dk, &KvSums::dk, problem.head_dim, ld, problem.softmax_scale, position,
          walk.row());
    store(params.dv, &KvSums::dv, problem.head_dim_v, ld_v, 1.0f, position, walk.row());
  }
}

// ---- launcher ----

// How the workspace is laid out; built with no base it only counts bytes.
struct BwdWorkspaceLayout {
  Splits splits;
  int64_t scratch_bytes, sums_floats;  // of a worker
  char* scratch;                       // [workers]
  float* row;                          // [workers, ld + ld_v]
  float* worker_sums;                  // [workers], where splits are apart
  KvSums* sums;                        // [groups, splits] there, else [batch * kv_heads, splits]
  int64_t bytes;

  BwdWorkspaceLayout(const SpattnBwdParams& params, int32_t threads, void* base) : splits(params) {
    const SpattnProblem& problem = params.problem;
    Arena sizes(nullptr), arena(base);
    const BwdScratch scratch_sizes(&sizes, problem);
    scratch_bytes = sizes.used();
    sums_floats = 0;
    const int64_t ld = scratch_sizes.ld, ld_v = scratch_sizes.ld_v, workers = Max(threads, 1);
    const int64_t heads = problem.batch * problem.kv_heads, groups = splits.groups();
    scratch = arena.Take<char>(workers * scratch_bytes);
    row = arena.Take<float>(workers * (ld + ld_v));
    sums = arena.Take<KvSums>((splits.are_apart() ? groups : heads) * splits.count());
    for (int64_t group = 0; group < groups; ++group) {
      int64_t past = 0;
      for (int64_t s = 0; s < splits.count(); ++s) {
        KvSums range = {};
        splits.KvRange(group, s, &range.begin, &range.end);
        range.store_begin = past;
        past = Max(past, range.end);
        range.store_end =
            s + 1 == splits.count() ? params.plan.kv_blocks * params.plan.block_kv : past;
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
    worker_sums = splits.are_apart() ? arena.Take<float>(workers * sums_floats) : nullptr;
    bytes = arena.used();
  }
};

inline int64_t BwdWorkspace(const SpattnBwdParams& params, int32_t workers) {
  return BwdWorkspaceLayout(params, workers, nullptr).bytes;
}

inline void Bwd(const SpattnBwdParams& params, const SpattnThreads& threads, void* workspace) {
  const SpattnProblem& problem = params.problem;
  const BwdWorkspaceLayout layout(params, threads.workers, workspace);
  const Splits& splits = layout.splits;
  const int64_t count = splits.count(), heads = problem.batch * problem.kv_heads;
  const int64_t group = problem.heads / problem.kv_heads;
  const int64_t ld = RoundUp(problem.head_dim, kPanel), ld_v = RoundUp(problem.head_dim_v, kPanel);

  // A row's heads lie side by side in memory: they are the innermost part of a task's number.
  ParallelFor(threads, heads * count, [&](int64_t task, int32_t worker) {
    const int64_t kv_head = task % problem.kv_heads, s = task / problem.kv_heads % count;
    const int64_t b = task / problem.kv_heads / count;
    Arena arena(layout.scratch + worker * layout.scratch_bytes);
    BwdScratch scratch(&arena, problem);
    KvSums sums;
    if (splits.are_apart()) {
      sums = layout.sums[(splits.groups() == 1 ? 0 : kv_head) * count + s];
      sums.dk = layout.worker_sums + worker * layout.sums_floats;
      sums.dv = sums.dk + (sums.end - sums.begin) * ld;
    } else {
      sums = layout.sums[(b * problem.kv_heads + kv_head) * count + s];
    }
    Zero(sums.dk, (sums.end - sums.begin) * ld);
    Zero(sums.dv, (sums.end - sums.begin) * ld_v);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
      const int64_t plan_head = splits.PlanHead(head);
      const int64_t end = splits.FirstQTile(plan_head, s + 1);
      for (int64_t q_tile = splits.FirstQTile(plan_head, s); q_tile < end; ++q_tile) {
        BwdQTile(scratch, params, b, head, q_tile, sums);
      }
    }
    if (splits.are_apart()) {
      StoreKvGrad(params, b, kv_head, &sums, 1, sums.store_begin, sums.store_end, ld, ld_v,
                  scratch.rows);
    }
  });
  if (splits.are_apart()) return;

  const int64_t positions = params.plan.kv_blocks * params.plan.block_kv;
  constexpr int64_t kPositions = 256;  // of a task
  const int64_t chunks = CeilDiv(positions, kPositions);
  ParallelFor(threads, heads * chunks, [&](int64_t task, int32_t worker) {
    const int64_t head = task / chunks, begin = task % chunks * kPositions;
    StoreKvGrad(params, head / problem.kv_heads, head % problem.kv_heads,
                layout.sums + head * count, count, begin, Min(begin + kPositions, positions), ld,
                ld_v, layout.row + worker * (ld + ld_v));
  });
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_ATTENTION_BWD_H_
