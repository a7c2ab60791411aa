// tiles.h — from the caller's tensors to the tiles of words that the products read, and back.
//
// A q tile is cut into panels of kPanel queries. A key tile is up to kTileKV existing keys gathered
// from the kv blocks of one q tile, all of them FULL or all PARTIAL: small blocks fill large tiles,
// and keys past a sequence's end are never loaded, so no product knows about tails.
//
// A task takes a few heads at once. They lie side by side in [batch, time, heads * dim], so a tile's rows
// are found once for all of them and read whole: read 256 bytes at a time, one head after another,
// they defeat the CPU's prefetcher (Zen 3: 12 MB in 2.0 ms, and in 0.36 ms with four heads at once).
#ifndef SPARSE_ATTENTION_CPU_TILES_H_
#define SPARSE_ATTENTION_CPU_TILES_H_

#include "cpu/matmul.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr int kTileQ = 128;  // positions in a q tile, at most
constexpr int kTileKV = 64;  // keys in a key tile, at most
constexpr int kMaxPanels = kTileQ / kPanel;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxTaskHeads = 4;
constexpr int kMinTasksAWorker = 4;

SPATTN_INLINE int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }
SPATTN_INLINE int64_t RoundUp(int64_t a, int64_t b) { return CeilDiv(a, b) * b; }
SPATTN_INLINE int64_t Min(int64_t a, int64_t b) { return a < b ? a : b; }
SPATTN_INLINE int64_t Max(int64_t a, int64_t b) { return a > b ? a : b; }

// ---- positions and rows ----

// Walks the rows of consecutive positions; row() is -1 where a position does not exist.
class RowWalk {
 public:
  RowWalk(int64_t len, int64_t stride, int64_t position)
      : len_(len), stride_(stride), per_residue_(CeilDiv(len, stride)) {
    residue_ = per_residue_ > 0 ? position / per_residue_ : stride;
    step_ = per_residue_ > 0 ? position % per_residue_ : 0;
  }
  int64_t row() const {
    const int64_t row = step_ * stride_ + residue_;
    return residue_ < stride_ && row < len_ ? row : -1;
  }
  void Next() {
    if (++step_ == per_residue_) step_ = 0, ++residue_;
  }

 private:
  int64_t len_, stride_, per_residue_, residue_, step_;
};

// ---- heads of a task ----

// Heads first, first + step, ... of one batch element, which share a plan.
struct Heads {
  int64_t b, first, step;
  int count;
  int64_t operator[](int i) const { return first + i * step; }
};

// How many heads a task takes: a power of 2 that divides `heads`, as many as keep the task's tiles in
// the level-2 cache (rows_a_head of each) and leave `workers` something to share (tasks at one head each).
inline int HeadsATask(const SpattnPlan& plan, const SpattnScoreRule& rule, int64_t heads,
                      int64_t rows_a_head, int64_t max_rows, int64_t tasks, int64_t workers) {
  const bool share_keys = plan.heads == 1 && rule.mask_strides[1] == 0;
  int64_t count = share_keys ? kMaxTaskHeads : 1;
  while (count > 1 && (heads % count != 0 || count * rows_a_head > max_rows ||
                       tasks / count < kMinTasksAWorker * workers)) {
    count /= 2;
  }
  return static_cast<int>(count);
}

// ---- q tiles ----

// The tiles, or blocks, of a plan that hold rows: all, unless the plan is longer than its tensors.
SPATTN_INLINE int64_t CountWithRows(const SpattnProblem& problem, int64_t len, int64_t tile) {
  return CeilDiv(CeilDiv(len, problem.row_stride) * problem.row_stride, tile);
}
SPATTN_INLINE int64_t QTilesWithRows(const SpattnProblem& problem, const SpattnPlan& plan) {
  return CountWithRows(problem, problem.q_len, plan.tile_q);
}
SPATTN_INLINE int64_t KvBlocksWithRows(const SpattnProblem& problem, const SpattnPlan& plan) {
  return CountWithRows(problem, problem.kv_len, plan.block_size);
}

// The positions of one q tile: rows[i] is the row of its i-th query, -1 where there is none.
struct QTile {
  int panels;
  int64_t rows[kTileQ];

  QTile(const SpattnProblem& problem, const SpattnPlan& plan, int64_t tile)
      : panels(static_cast<int>(CeilDiv(plan.tile_q, kPanel))) {
    RowWalk walk(problem.q_len, problem.row_stride, tile * plan.tile_q);
    for (int i = 0; i < panels * kPanel; ++i, walk.Next()) {
      rows[i] = i < plan.tile_q ? walk.row() : -1;
    }
  }
};

// rows [panels * kPanel, ld] <-> panels [panels][dim, kPanel]; dim a multiple of 4.
inline void RowsToPanels(const float* rows, int panels, int dim, int64_t ld, float* to) {
  for (int i = 0; i < panels * kPanel; i += 4) {
    float* column = to + (i / kPanel) * dim * kPanel + i % kPanel;
    for (int d = 0; d < dim; d += 4) {
      Transpose4x4(rows + i * ld + d, ld, column + d * kPanel, kPanel);
    }
  }
}

inline void PanelsToRows(const float* panels, int count, int dim, int64_t ld, float* rows) {
  for (int i = 0; i < count * kPanel; i += 4) {
    const float* column = panels + (i / kPanel) * dim * kPanel + i % kPanel;
    for (int d = 0; d < dim; d += 4) {
      Transpose4x4(column + d * kPanel, kPanel, rows + i * ld + d, ld);
    }
  }
}

// How many rows ahead of their use they are fetched: 2 KB, about what a CPU can have under way.
SPATTN_INLINE int RowsAhead(const SpattnProblem& problem, const Heads& heads, int dim) {
  return static_cast<int>(CeilDiv(2048, heads.count * dim * ElementBytes(problem.dtype)));
}

// Fetches a row of all heads; rows that a stride sets apart are out of sight of the CPU's prefetcher.
template <bool kForWrite>
SPATTN_INLINE void PrefetchRow(const SpattnTensor& t, const SpattnProblem& problem,
                               const Heads& heads, int64_t row, int dim) {
  if (row < 0) return;
  for (int h = 0; h < heads.count; ++h) {
    const char* from = RowAddress(t, problem.dtype, heads.b, heads[h], row);
    for (int64_t byte = 0; byte < dim * ElementBytes(problem.dtype); byte += 64) {
      __builtin_prefetch(from + byte, kForWrite);
    }
  }
}

// Fetches `count` rows of a tile from its i-th on, as far as it has them.
template <bool kForWrite>
SPATTN_INLINE void PrefetchQRows(const SpattnTensor& t, const SpattnProblem& problem,
                                 const Heads& heads, const QTile& tile, int i, int count, int dim) {
  for (const int end = i + count; i < end && i < tile.panels * kPanel; ++i) {
    PrefetchRow<kForWrite>(t, problem, heads, tile.rows[i], dim);
  }
}

// Words of row i of a tile, from head h; 0 where there is no row.
template <class Terms>
SPATTN_INLINE void LoadQRow(const SpattnTensor& t, const SpattnProblem& problem, const Heads& heads,
                            int h, int64_t row, int dim, float* to) {
  if (row < 0) {
    Zero(to, dim / Terms::kTerms);
  } else {
    const char* from = RowAddress(t, problem.dtype, heads.b, heads[h], row);
    Terms::LoadRow(from, problem.dtype, dim, to);
  }
}

// to [heads][kTileQ, ld]: the tile's rows; 0 beyond dim.
template <class Terms>
inline void LoadQRows(const SpattnTensor& t, const SpattnProblem& problem, const Heads& heads,
                      const QTile& tile, int dim, int64_t ld, float* to) {
  const int words = dim / Terms::kTerms, ahead = RowsAhead(problem, heads, dim);
  for (int i = 0; i < tile.panels * kPanel; ++i) {
    PrefetchQRows<false>(t, problem, heads, tile, i + ahead, 1, dim);
    for (int h = 0; h < heads.count; ++h) {
      float* row = to + (h * kTileQ + i) * ld;
      LoadQRow<Terms>(t, problem, heads, h, tile.rows[i], dim, row);
      Zero(row + words, ld - words);
    }
  }
}

// to [heads][kMaxPanels][dim / kTerms, kPanel]: the tile's rows as panels.
template <class Terms>
inline void LoadQPanels(const SpattnTensor& t, const SpattnProblem& problem, const Heads& heads,
                        const QTile& tile, int dim, float* to) {
  const int words = dim / Terms::kTerms;
  const int ahead = RowsAhead(problem, heads, dim);
  float rows[4 * kMaxHeadDim];
  for (int i = 0; i < tile.panels * kPanel; i += 4) {
    PrefetchQRows<false>(t, problem, heads, tile, i + ahead, 4, dim);
    for (int h = 0; h < heads.count; ++h) {
      for (int r = 0; r < 4; ++r) {
        LoadQRow<Terms>(t, problem, heads, h, tile.rows[i + r], dim, rows + r * words);
      }
      float* column = to + (h * kMaxPanels + i / kPanel) * words * kPanel + i % kPanel;
      for (int word = 0; word < words; word += 4) {
        Transpose4x4(rows + word, words, column + word * kPanel, kPanel);
      }
    }
  }
}

// Rows of t from panels [heads][kMaxPanels][dim, kPanel], query i of head h times factor(h, i).
template <class Factor>
inline void StoreQPanels(const float* panels, const Factor& factor, const SpattnProblem& problem,
                         const Heads& heads, const QTile& tile, int dim, const SpattnTensor& t) {
  const int ahead = RowsAhead(problem, heads, dim);
  float rows[4 * kMaxHeadDim];
  for (int i = 0; i < tile.panels * kPanel; i += 4) {
    PrefetchQRows<true>(t, problem, heads, tile, i + ahead, 4, dim);
    for (int h = 0; h < heads.count; ++h) {
      const float* column = panels + (h * kMaxPanels + i / kPanel) * dim * kPanel + i % kPanel;
      for (int d = 0; d < dim; d += 4) {
        Transpose4x4(column + d * kPanel, kPanel, rows + d, dim);
      }
      for (int r = 0; r < 4; ++r) {
        if (tile.rows[i + r] < 0) continue;
        float* row = rows + r * dim;
        const float times = factor(h, i + r);
        for (int d = 0; d < dim; d += kRowLanes) StoreAs(row + d, LoadAs<RowVec>(row + d) * times);
        const char* to = RowAddress(t, problem.dtype, heads.b, heads[h], tile.rows[i + r]);
        StoreRow(row, problem.dtype, dim, const_cast<char*>(to));
      }
    }
  }
}

// ---- key tiles ----

// Keys [begin, end) of a tile.
struct KeyRange {
  int begin, end;
  int count() const { return end - begin; }
};

// The keys of one tile: where each lies, and for PARTIAL blocks who attends to it.
struct KeyTile {
  int count;
  int64_t rows[kTileKV];
  int64_t positions[kTileKV];
  uint32_t attends[kMaxPanels][kTileKV];  // bit i: query i of the panel attends to the key
  KeyRange read[kMaxPanels];  // what any query of the panel attends to lies in it: skip the rest
};

// Who may attend to whom in one q tile by the segments and the mask of a rule.
class Admits {
 public:
  Admits(const SpattnProblem& problem, const SpattnScoreRule& rule, const QTile& tile, int64_t b,
         int64_t head)
      : tile_(tile) {
    if (rule.mask) {
      mask_ = rule.mask + b * rule.mask_strides[0] + head * rule.mask_strides[1];
      q_stride_ = rule.mask_strides[2];
      kv_stride_ = rule.mask_strides[3];
    }
    if (rule.q_segments == nullptr) return;
    kv_segments_ = rule.kv_segments + b * problem.kv_len;
    for (int i = 0; i < tile.panels * kPanel; ++i) {
      const int64_t row = tile.rows[i];
      q_segments_[i] = row < 0 ? -1 : rule.q_segments[b * problem.q_len + row];
      if (q_segments_[i] < 0) continue;
      if (q_segments_[i] < first_) first_ = q_segments_[i];
      if (q_segments_[i] > last_) last_ = q_segments_[i];
    }
  }

  // False where no query of the tile attends to the key, as far as one look tells.
  bool MayAttend(int64_t kv_row) const {
    if (mask_ && q_stride_ == 0 && !mask_[kv_row * kv_stride_]) return false;
    return !kv_segments_ || (kv_segments_[kv_row] >= first_ && kv_segments_[kv_row] <= last_);
  }

  // Bit i: query i of the panel may attend to the key.
  uint32_t Bits(int panel, int64_t kv_row) const {
    uint32_t bits = ~uint32_t{0};
    if (kv_segments_) {
      bits = 0;
      const int32_t segment = kv_segments_[kv_row];
      const int32_t* of_queries = q_segments_ + panel * kPanel;
      for (int i = 0; segment >= 0 && i < kPanel; ++i) {
        bits |= static_cast<uint32_t>(of_queries[i] == segment) << i;
      }
    }
    if (mask_ && q_stride_ != 0) {
      const int64_t* rows = tile_.rows + panel * kPanel;
      for (int i = 0; i < kPanel; ++i) {
        const bool may = rows[i] >= 0 && mask_[rows[i] * q_stride_ + kv_row * kv_stride_];
        bits &= ~(static_cast<uint32_t>(!may) << i);
      }
    }
    return bits;
  }

 private:
  const QTile& tile_;
  const uint8_t* mask_ = nullptr;  // of this batch element and head
  int64_t q_stride_ = 0, kv_stride_ = 0;
  const int32_t* kv_segments_ = nullptr;          // of this batch element
  int32_t q_segments_[kTileQ];                    // negative where there is no query
  int32_t first_ = INT32_MAX, last_ = INT32_MIN;  // least and largest that is not negative
};

// Walks the keys of one q tile's FULL blocks (kMasked = false) or PARTIAL ones, tile by tile; under a
// rule (kMasked = true, admits not null) those of both, and FULL blocks have bits too.
template <bool kMasked>
class KeyWalk {
 public:
  KeyWalk(const SpattnProblem& problem, const SpattnPlan& plan, int64_t plan_head, int64_t q_tile,
          int64_t b, const Admits* admits)
      : problem_(problem), plan_(plan), admits_(admits), walk_(0, 1, 0) {
    const int32_t* indptr = plan.kv_indptr + plan_head * plan.q_tiles + q_tile;
    entry_ = indptr[0];
    end_ = indptr[1];
    const int64_t blocks = KvBlocksWithRows(problem, plan);
    while (end_ > entry_ && plan.kv_indices[end_ - 1] >= blocks) --end_;  // they increase
    kv_end_ = problem.kv_lengths ? Min(problem.kv_lengths[b], problem.kv_len) : problem.kv_len;
  }

  bool Next(KeyTile* tile) {
    tile->count = 0;
    while (tile->count < kTileKV && entry_ < end_) {
      if (admits_ || (plan_.mask_ids[entry_] >= 0) == kMasked) TakeFromBlock(tile);
      if (column_ == 0) ++entry_;
    }
    for (int panel = 0; panel * kPanel < plan_.tile_q; ++panel) {
      KeyRange& read = tile->read[panel];
      read = {0, tile->count};
      if (!kMasked) continue;
      uint32_t* attends = tile->attends[panel];
      SetAttends(panel, tile->count, attends);
      for (int i = 0; admits_ && i < tile->count; ++i) {
        attends[i] &= admits_->Bits(panel, tile->rows[i]);
      }
      while (read.end > 0 && attends[read.end - 1] == 0) --read.end;
      while (read.begin < read.end && attends[read.begin] == 0) ++read.begin;
      read.begin -= read.begin % 4;  // a few keys more are cheaper than a low register tile
      read.end = static_cast<int>(Min(RoundUp(read.end, 4), tile->count));
    }
    return tile->count > 0;
  }

 private:
  // Adds keys of the present block until it ends (column_ == 0 again) or the tile is full.
  void TakeFromBlock(KeyTile* tile) {
    const int64_t start = static_cast<int64_t>(plan_.kv_indices[entry_]) * plan_.block_size;
    const uint8_t* block = nullptr;
    if (kMasked && plan_.mask_ids[entry_] >= 0) {
      block = plan_.mask_bits + plan_.mask_ids[entry_] * RowBytes() * plan_.block_size;
    }
    if (column_ == 0) walk_ = RowWalk(problem_.kv_len, problem_.row_stride, start);
    while (tile->count < kTileKV) {
      const int64_t row = walk_.row();
      if (row >= 0 && row < kv_end_ && (!admits_ || admits_->MayAttend(row))) {
        tile->rows[tile->count] = row;
        tile->positions[tile->count] = start + column_;
        if (kMasked) mask_rows_[tile->count] = block ? block + column_ * RowBytes() : kAllAttend;
        ++tile->count;
      }
      walk_.Next();
      if (++column_ == plan_.block_size) {
        column_ = 0;
        return;
      }
    }
  }

  static constexpr uint8_t kAllAttend[kTileQ / 8] = {255, 255, 255, 255, 255, 255, 255, 255,
                                                     255, 255, 255, 255, 255, 255, 255, 255};

  int64_t RowBytes() const { return plan_.tile_q / 8; }

  // Bytes are in little-endian order: bit 8 of a word is bit 0 of byte 1.
  void SetAttends(int panel, int count, uint32_t* attends) const {
    constexpr int kBytes = kPanel / 8;
    if (RowBytes() < kBytes) {
      memset(attends, 0, count * sizeof(*attends));
      for (int i = 0; i < count; ++i) memcpy(attends + i, mask_rows_[i], RowBytes());
      return;
    }
    for (int i = 0; i < count; ++i) {
      uint32_t word = 0;
      memcpy(&word, mask_rows_[i] + panel * kBytes, kBytes);
      attends[i] = word;
    }
  }

  const SpattnProblem& problem_;
  const SpattnPlan& plan_;
  const Admits* const admits_;
  RowWalk walk_;
  int64_t entry_, end_, kv_end_;
  int column_ = 0;
  const uint8_t* mask_rows_[kTileKV];  // of the present tile's keys
};

// to [heads][kTileKV, dim / kTerms]
template <class Terms>
inline void LoadKeys(const SpattnTensor& t, const SpattnProblem& problem, const Heads& heads,
                     const KeyTile& tile, int dim, float* to) {
  const int words = dim / Terms::kTerms, ahead = RowsAhead(problem, heads, dim);
  for (int i = 0; i < tile.count; ++i) {
    if (i + ahead < tile.count) PrefetchRow<false>(t, problem, heads, tile.rows[i + ahead], dim);
    for (int h = 0; h < heads.count; ++h) {
      const char* from = RowAddress(t, problem.dtype, heads.b, heads[h], tile.rows[i]);
      Terms::LoadRow(from, problem.dtype, dim, to + (h * kTileKV + i) * words);
    }
  }
}

// ---- scratch ----

// Hands out 64-byte aligned pieces of a workspace; with no workspace it only counts the bytes.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    T* piece = base_ ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_TILES_H_
