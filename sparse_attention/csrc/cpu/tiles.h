// tiles.h — from the caller's tensors to the float32 tiles that the matrix products read, and back.
//
// A q tile is cut into panels of kPanel queries. A key tile is up to kTileKV existing keys gathered
// from the kv blocks of one q tile, all of them FULL or all PARTIAL: small blocks fill large tiles,
// and keys past a sequence's end are never loaded, so no product knows about tails.
#ifndef SPARSE_ATTENTION_CPU_TILES_H_
#define SPARSE_ATTENTION_CPU_TILES_H_

#include "../core.h"
#include "matmul.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr int kTileQ = 128;  // positions in a q tile, at most
constexpr int kTileKV = 64;  // keys in a key tile, at most
constexpr int kMaxPanels = kTileQ / kPanel;

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

// ---- rows of any dtype to float32 and back ----

SPATTN_INLINE int64_t ElementBytes(int32_t dtype) { return dtype == SPATTN_FLOAT32 ? 4 : 2; }

SPATTN_INLINE const char* RowAddress(const SpattnTensor& t, int32_t dtype, int64_t b, int64_t head,
                                     int64_t row) {
  const int64_t element = b * t.batch_stride + row * t.row_stride + head * t.head_stride;
  return static_cast<const char*>(t.data) + element * ElementBytes(dtype);
}

template <Vec (*kConvert)(HalfVec)>
SPATTN_INLINE void WidenRow(const char* from, int dim, float* to) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) Store(to + d, kConvert(LoadAs<HalfVec>(from + 2 * d)));
  if (d < dim) {  // dim is a multiple of 8; AVX-512 has 16 lanes
    HalfVec tail{};
    memcpy(&tail, from + 2 * d, 2 * (dim - d));
    Vec wide = kConvert(tail);
    memcpy(to + d, &wide, 4 * (dim - d));
  }
}

template <HalfVec (*kConvert)(Vec)>
SPATTN_INLINE void NarrowRow(const float* from, int dim, char* to) {
  int d = 0;
  for (; d + kLanes <= dim; d += kLanes) StoreAs(to + 2 * d, kConvert(Load(from + d)));
  if (d < dim) {
    Vec tail{};
    memcpy(&tail, from + d, 4 * (dim - d));
    HalfVec narrow = kConvert(tail);
    memcpy(to + 2 * d, &narrow, 2 * (dim - d));
  }
}

SPATTN_INLINE void LoadRow(const char* from, int32_t dtype, int dim, float* to) {
  if (dtype == SPATTN_FLOAT32) {
    memcpy(to, from, 4 * dim);
  } else if (dtype == SPATTN_FLOAT16) {
    WidenRow<FromFloat16>(from, dim, to);
  } else {
    WidenRow<FromBfloat16>(from, dim, to);
  }
}

// Rows that a stride sets apart are out of sight of the CPU's own prefetcher.
constexpr int kRowsAhead = 8;

SPATTN_INLINE void PrefetchRow(const char* row, int32_t dtype, int dim) {
  for (int64_t byte = 0; byte < dim * ElementBytes(dtype); byte += 64)
    __builtin_prefetch(row + byte);
}

SPATTN_INLINE void StoreRow(const float* from, int32_t dtype, int dim, char* to) {
  if (dtype == SPATTN_FLOAT32) {
    memcpy(to, from, 4 * dim);
  } else if (dtype == SPATTN_FLOAT16) {
    NarrowRow<ToFloat16>(from, dim, to);
  } else {
    NarrowRow<ToBfloat16>(from, dim, to);
  }
}

// True if x - x is 0 for every element: no NaN, no Inf.
SPATTN_INLINE bool RowIsFinite(const float* row, int dim) {
  Vec4 sum{};
  for (int d = 0; d < dim; d += 4) {
    const Vec4 x = LoadAs<Vec4>(row + d);
    sum += x - x;
  }
  return sum[0] + sum[1] + sum[2] + sum[3] == 0.0f;
}

// ---- q tiles ----

// The positions of one q tile: rows[i] is the row of its i-th query, -1 where there is none.
struct QTile {
  int panels;
  int64_t rows[kTileQ];

  QTile(const SpattnProblem& problem, const SpattnPlan& plan, int64_t tile)
      : panels(static_cast<int>(CeilDiv(plan.block_q, kPanel))) {
    RowWalk walk(problem.q_len, problem.row_stride, tile * plan.block_q);
    for (int i = 0; i < panels * kPanel; ++i, walk.Next()) {
      rows[i] = i < plan.block_q ? walk.row() : -1;
    }
  }
};

// to[i] = the tile's i-th row as float32 [dim], leading dimension ld; 0 beyond dim and where no row is.
inline void LoadQRows(const SpattnTensor& t, const SpattnProblem& problem, int64_t b, int64_t head,
                      const QTile& tile, int dim, int64_t ld, float* to) {
  for (int i = 0; i < tile.panels * kPanel; ++i, to += ld) {
    const bool exists = tile.rows[i] >= 0;
    if (i + kRowsAhead < tile.panels * kPanel && tile.rows[i + kRowsAhead] >= 0) {
      PrefetchRow(RowAddress(t, problem.dtype, b, head, tile.rows[i + kRowsAhead]), problem.dtype,
                  dim);
    }
    if (exists)
      LoadRow(RowAddress(t, problem.dtype, b, head, tile.rows[i]), problem.dtype, dim, to);
    const int filled = exists ? dim : 0;
    Zero(to + filled, ld - filled);
  }
}

inline void StoreQRows(const float* from, const SpattnTensor& t, const SpattnProblem& problem,
                       int64_t b, int64_t head, const QTile& tile, int dim, int64_t ld) {
  for (int i = 0; i < tile.panels * kPanel; ++i, from += ld) {
    if (tile.rows[i] < 0) continue;
    const char* to = RowAddress(t, problem.dtype, b, head, tile.rows[i]);
    StoreRow(from, problem.dtype, dim, const_cast<char*>(to));
  }
}

// rows [panels * kPanel, ld] <-> panels [panels][dim, kPanel]; dim a multiple of 8.
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

// Walks the keys of one q tile's FULL blocks (kMasked = false) or PARTIAL ones, tile by tile.
template <bool kMasked>
class KeyWalk {
 public:
  KeyWalk(const SpattnProblem& problem, const SpattnPlan& plan, int64_t plan_head, int64_t q_tile,
          int64_t b)
      : problem_(problem), plan_(plan), walk_(0, 1, 0) {
    const int32_t* indptr = plan.kv_indptr + plan_head * plan.q_tiles + q_tile;
    entry_ = indptr[0];
    end_ = indptr[1];
    kv_end_ = problem.kv_lengths ? Min(problem.kv_lengths[b], problem.kv_len) : problem.kv_len;
  }

  bool Next(KeyTile* tile) {
    tile->count = 0;
    while (tile->count < kTileKV && entry_ < end_) {
      if ((plan_.mask_ids[entry_] >= 0) == kMasked) TakeFromBlock(tile);
      if (column_ == 0) ++entry_;
    }
    for (int panel = 0; panel * kPanel < plan_.block_q; ++panel) {
      KeyRange& read = tile->read[panel];
      read = {0, tile->count};
      if (!kMasked) continue;
      const uint32_t* attends = tile->attends[panel];
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
    const int64_t start = static_cast<int64_t>(plan_.kv_indices[entry_]) * plan_.block_kv;
    if (column_ == 0) walk_ = RowWalk(problem_.kv_len, problem_.row_stride, start);
    while (tile->count < kTileKV) {
      const int64_t row = walk_.row();
      if (row >= 0 && row < kv_end_) {
        tile->rows[tile->count] = row;
        tile->positions[tile->count] = start + column_;
        if (kMasked) SetAttends(tile);
        ++tile->count;
      }
      walk_.Next();
      if (++column_ == plan_.block_kv) {
        column_ = 0;
        return;
      }
    }
  }

  void SetAttends(KeyTile* tile) const {
    const int row_bytes = plan_.block_q / 8;
    const uint8_t* bits =
        plan_.mask_bits +
        (static_cast<int64_t>(plan_.mask_ids[entry_]) * plan_.block_kv + column_) * row_bytes;
    for (int panel = 0; panel * kPanel < plan_.block_q; ++panel) {
      uint32_t word = 0;  // bytes in little-endian order: bit 8 of the word is bit 0 of byte 1
      if (plan_.block_q >= kPanel) {
        memcpy(&word, bits + panel * (kPanel / 8), kPanel / 8);
      } else {
        memcpy(&word, bits, row_bytes);
      }
      tile->attends[panel][tile->count] = word;
    }
  }

  const SpattnProblem& problem_;
  const SpattnPlan& plan_;
  RowWalk walk_;
  int64_t entry_, end_, kv_end_;
  int column_ = 0;
};

inline void LoadKeys(const SpattnTensor& t, const SpattnProblem& problem, int64_t b,
                     int64_t kv_head, const KeyTile& tile, int dim, int64_t ld, float* to) {
  for (int i = 0; i < tile.count; ++i) {
    LoadRow(RowAddress(t, problem.dtype, b, kv_head, tile.rows[i]), problem.dtype, dim,
            to + i * ld);
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
