// blocksparse_kernels.cc — products and softmax over tensors of blocks on the CPU.
//
// Math: see blocksparse.h.
//
// Mapping: nt: one task per kBlocksATask blocks of a head, which share a transposed q block where
//            their q block is the same; lanes are queries.
//          nn, tn: one task per block of rows of the result, which owns its sum; lanes are head_dim.
//          softmax and its gradient: one task per q block, a few queries at a time; lanes are keys.
// Tiles:   q_panels [panels][head_dim, kPanel]   s [panels][block_size keys, kPanel]        (nt)
//          w [block_size, block_size]   sum [panels of head_dim][block_size, kPanel]        (nn, tn)
//          s, dy [kQueriesAtOnce, longest list * block_size]                                (softmax)
// Memory:  workspace a worker: 64 KB of products at block size 64 and head_dim 64; of a softmax about
//          32 bytes for every key of the longest list.
// Cost:    nt, nn, tn: 2 block_size^2 head_dim FLOP per block, one matmul each.
// Numerics: float32 inside, one rounding on the way out. Bitwise deterministic: a task owns what it
//          writes and takes a list in its order.
#include "cpu/blocksparse_kernels.h"

#include "cpu/parallel.h"
#include "cpu/tiles.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr int64_t kBlocksATask = 32;
constexpr float kLowest = -3.40282347e38f;  // the lowest finite float

// ---- where things lie ----

// The entries of the table that a head reads, as pairs.
SPATTN_INLINE const int32_t* HeadLut(const SpattnLut& lut, int64_t head) {
  return lut.data + (lut.heads == 1 ? 0 : head) * lut.entries * 2;
}

struct List {
  const int32_t* entries;  // [size, 2]: (block, other block)
  int64_t size;

  List(const SpattnLut& lut, int64_t head, int64_t row) {
    const int32_t* pairs = HeadLut(lut, head);
    entries = pairs + 2 * static_cast<int64_t>(pairs[2 * row]);
    size = pairs[2 * row + 1];
  }
  int64_t block(int64_t i) const { return entries[2 * i]; }
  int64_t other(int64_t i) const { return entries[2 * i + 1]; }
};

SPATTN_INLINE char* At(const SpattnArray& a, int64_t element) {
  return static_cast<char*>(a.data) + element * ElementBytes(a.dtype);
}

SPATTN_INLINE char* BlockAt(const SpattnArray& a, const SpattnBlocks& g, int64_t b, int64_t head,
                            int64_t block) {
  return At(a, ((b * g.heads + head) * g.blocks + block) * g.block_size * g.block_size);
}

// A block of rows of one head in a tensor [batch, row_blocks * block_size, heads * head_dim].
SPATTN_INLINE char* RowsAt(const SpattnArray& a, const SpattnBlocksMatmul& params, int64_t b,
                           int64_t head, int64_t row_blocks, int64_t row_block) {
  const SpattnBlocks& g = params.blocks;
  const int64_t row = (b * row_blocks + row_block) * g.block_size;
  return At(a, (row * g.heads + head) * params.head_dim);
}

// `count` elements as float32: in place if they are, else widened into `scratch`.
SPATTN_INLINE const float* Widened(const char* from, int32_t dtype, int count, float* scratch) {
  if (dtype == SPATTN_FLOAT32) return reinterpret_cast<const float*>(from);
  LoadRow(from, dtype, count, scratch);
  return scratch;
}

// A block of rows as float32 with `width` readable elements each, of which those past head_dim are
// anything.
struct RowsView {
  const float* data;
  int64_t ld;

  RowsView(const char* from, const SpattnArray& array, const SpattnBlocksMatmul& params,
           int64_t width, float* scratch) {
    const int64_t stride = params.blocks.heads * params.head_dim;
    if (array.dtype == SPATTN_FLOAT32 && width == params.head_dim) {
      data = reinterpret_cast<const float*>(from);
      ld = stride;
      return;
    }
    for (int i = 0; i < params.blocks.block_size; ++i) {
      LoadRow(from + i * stride * ElementBytes(array.dtype), array.dtype,
              static_cast<int>(params.head_dim), scratch + i * width);
    }
    data = scratch;
    ld = width;
  }
};

// ---- scratch of the products ----

struct MatmulScratch {
  float *rows, *panels, *blocks, *other_rows;
  int64_t head_dim_panels;

  MatmulScratch(Arena* arena, const SpattnBlocksMatmul& params) {
    const int64_t block_size = params.blocks.block_size, queries = RoundUp(block_size, kPanel);
    head_dim_panels = CeilDiv(params.head_dim, kPanel);
    const int64_t width = head_dim_panels * kPanel;
    rows = arena->Take<float>(queries * Max(width, block_size));
    panels = arena->Take<float>(queries * width);
    blocks = arena->Take<float>(queries * block_size);
    other_rows = arena->Take<float>(block_size * width);
  }
};

inline int64_t MatmulScratchBytes(const SpattnBlocksMatmul& params) {
  Arena arena(nullptr);
  MatmulScratch scratch(&arena, params);
  return arena.used();
}

inline int64_t MatmulWorkspace(const SpattnBlocksMatmul& params, int32_t workers) {
  return MatmulScratchBytes(params) * Max(workers, 1);
}

// Calls body(scratch, task) for every task, each worker with its own scratch.
template <class Body>
inline void ForMatmulTasks(const SpattnBlocksMatmul& params, int64_t tasks,
                           const SpattnThreads& threads, void* workspace, const Body& body) {
  const int64_t scratch_bytes = MatmulScratchBytes(params);
  ParallelFor(threads, tasks, [&](int64_t task, int32_t worker) {
    Arena arena(static_cast<char*>(workspace) + worker * scratch_bytes);
    body(MatmulScratch(&arena, params), task);
  });
}

// ---- nt: scores = q kv^T ----

// panels [panels][head_dim, kPanel] = the q block transposed. Lanes beyond the block hold anything; no
// other lane reads them, and they are not stored.
inline void LoadQPanels(const MatmulScratch& x, const SpattnBlocksMatmul& params, int64_t b,
                        int64_t head, int64_t q_block, int panels) {
  const SpattnBlocks& g = params.blocks;
  const int head_dim = static_cast<int>(params.head_dim);
  const char* from = RowsAt(params.q, params, b, head, g.q_blocks, q_block);
  const int64_t row_bytes = g.heads * params.head_dim * ElementBytes(params.q.dtype);
  for (int i = 0; i < g.block_size; ++i) {
    LoadRow(from + i * row_bytes, params.q.dtype, head_dim, x.rows + i * params.head_dim);
  }
  RowsToPanels(x.rows, panels, head_dim, head_dim, x.panels);
}

inline void NtBlock(const MatmulScratch& x, const SpattnBlocksMatmul& params, int64_t b,
                    int64_t head, int64_t kv_block, int panels, char* block) {
  const int block_size = params.blocks.block_size, head_dim = static_cast<int>(params.head_dim);
  const char* from = RowsAt(params.kv, params, b, head, params.blocks.kv_blocks, kv_block);
  const RowsView k(from, params.kv, params, head_dim, x.other_rows);
  for (int panel = 0; panel < panels; ++panel) {
    const float* q = x.panels + panel * head_dim * kPanel;
    float* s = x.blocks + panel * block_size * kPanel;
    ForRowTiles(block_size, [&](int j, auto height) {
      auto acc = ZeroTile<decltype(height)::kRows>();
      MultiplyAdd<Floats, kRowMajor>(acc, k.data + j * k.ld, k.ld, q, kPanel, head_dim);
      StoreTile(acc, s + j * kPanel);
    });
  }
  PanelsToRows(x.blocks, panels, block_size, block_size, x.rows);
  StoreRow(x.rows, params.scores.dtype, block_size * block_size, block);
}

inline void Nt(const SpattnBlocksMatmul& params, const SpattnThreads& threads, void* workspace) {
  const SpattnBlocks& g = params.blocks;
  const int64_t tasks_a_head = CeilDiv(g.blocks, kBlocksATask);
  const int panels = static_cast<int>(CeilDiv(g.block_size, kPanel));
  const int64_t block_bytes = g.block_size * g.block_size * ElementBytes(params.scores.dtype);
  const int64_t tasks = g.batch * g.heads * tasks_a_head;
  ForMatmulTasks(params, tasks, threads, workspace, [&](const MatmulScratch& x, int64_t task) {
    const int64_t head = task / tasks_a_head % g.heads, b = task / tasks_a_head / g.heads;
    const int64_t first = task % tasks_a_head * kBlocksATask;
    const int64_t end = Min(first + kBlocksATask, g.blocks);
    const int32_t* coords = HeadLut(params.lut, head);
    int64_t loaded = -1;
    for (int64_t block = first; block < end; ++block) {
      char* to = BlockAt(params.scores, g, b, head, block);
      const int64_t q_block = coords[2 * block], kv_block = coords[2 * block + 1];
      if (q_block < 0) {
        memset(to, 0, block_bytes);
        continue;
      }
      if (q_block != loaded) LoadQPanels(x, params, b, head, q_block, panels);
      loaded = q_block;
      NtBlock(x, params, b, head, kv_block, panels, to);
    }
  });
}

// ---- nn: q = scores kv, and tn: kv = scores^T q ----

template <ALayout kLayout>
inline void XnTask(const MatmulScratch& x, const SpattnBlocksMatmul& params, int64_t task) {
  constexpr bool kIsTn = kLayout == kColMajor;
  const SpattnBlocks& g = params.blocks;
  const int block_size = g.block_size, head_dim = static_cast<int>(params.head_dim);
  const SpattnArray &to = kIsTn ? params.kv : params.q, &from = kIsTn ? params.q : params.kv;
  const int64_t to_blocks = kIsTn ? g.kv_blocks : g.q_blocks;
  const int64_t from_blocks = kIsTn ? g.q_blocks : g.kv_blocks;
  const int64_t row = task % to_blocks;
  const int64_t head = task / to_blocks % g.heads, b = task / to_blocks / g.heads;
  const int64_t panel_size = block_size * kPanel;

  float* sum = x.panels;
  memset(sum, 0, 4 * x.head_dim_panels * panel_size);
  const List list(params.lut, head, row);
  for (int64_t i = 0; i < list.size; ++i) {
    const float* w = Widened(BlockAt(params.scores, g, b, head, list.block(i)), params.scores.dtype,
                             block_size * block_size, x.blocks);
    const char* rows = RowsAt(from, params, b, head, from_blocks, list.other(i));
    const RowsView v(rows, from, params, x.head_dim_panels * kPanel, x.other_rows);
    for (int64_t panel = 0; panel < x.head_dim_panels; ++panel) {
      ForRowTiles(block_size, [&](int r, auto height) {
        // A block's products are summed first: rounding errors then grow with the number of blocks
        // in the list, not of keys.
        constexpr int kRows = decltype(height)::kRows;
        float* tile = sum + panel * panel_size + r * kPanel;
        auto acc = ZeroTile<kRows>();
        MultiplyAdd<Floats, kLayout>(acc, w + (kIsTn ? r : r * block_size), block_size,
                                     v.data + panel * kPanel, v.ld, block_size);
        AddTile(LoadTile<kRows>(tile), acc);
        StoreTile(acc, tile);
      });
    }
  }
  char* out = RowsAt(to, params, b, head, to_blocks, row);
  for (int r = 0; r < block_size; ++r) {
    for (int64_t panel = 0; panel < x.head_dim_panels; ++panel) {
      const int64_t first = panel * kPanel;
      StoreRow(sum + panel * panel_size + r * kPanel, to.dtype,
               static_cast<int>(Min(kPanel, head_dim - first)),
               out + (r * g.heads * params.head_dim + first) * ElementBytes(to.dtype));
    }
  }
}

template <ALayout kLayout>
inline void Xn(const SpattnBlocksMatmul& params, const SpattnThreads& threads, void* workspace) {
  const SpattnBlocks& g = params.blocks;
  const int64_t tasks = g.batch * g.heads * (kLayout == kColMajor ? g.kv_blocks : g.q_blocks);
  ForMatmulTasks(params, tasks, threads, workspace,
                 [&](const MatmulScratch& x, int64_t task) { XnTask<kLayout>(x, params, task); });
}

// ---- softmax ----

// Queries are taken some at a time: what is read and written of a block is then more than one line of
// the cache in a row. One thread of a Zen 3, T 4096, 4 heads, block 32: 50 ms with 1, 36 with 4 or 8.
constexpr int kQueriesAtOnce = 4;

// The elements of some queries over all blocks of their list, as float32.
struct SoftmaxScratch {
  float *s, *dy;     // [kQueriesAtOnce, ld]
  uint8_t* attends;  // [kQueriesAtOnce, ld / 8]: bit j % 8 of byte j / 8 is set where the query
                     // attends to element j
  int64_t ld;

  SoftmaxScratch(Arena* arena, const SpattnBlocksSoftmax& params) {
    constexpr int64_t kOverrun = 32;  // of a last whole vector, and of the mask bits read for it
    ld = RoundUp(params.lut.longest * params.blocks.block_size + kOverrun, 64);
    s = arena->Take<float>(kQueriesAtOnce * ld);
    dy = arena->Take<float>(kQueriesAtOnce * ld);
    attends = arena->Take<uint8_t>(kQueriesAtOnce * ld / 8);
  }
};

inline int64_t SoftmaxScratchBytes(const SpattnBlocksSoftmax& params) {
  Arena arena(nullptr);
  SoftmaxScratch scratch(&arena, params);
  return arena.used();
}

inline int64_t SoftmaxWorkspace(const SpattnBlocksSoftmax& params, int32_t workers) {
  return SoftmaxScratchBytes(params) * Max(workers, 1);
}

// Queries first, first + 1, ... of a list's blocks.
struct Queries {
  const SpattnBlocks& g;
  const List& list;
  int64_t b, head, first;

  int64_t count() const { return list.size * g.block_size; }

  // What fills the last vector is 0.
  void Gather(const SpattnArray& from, int64_t ld, float* to) const {
    const int64_t row_bytes = g.block_size * ElementBytes(from.dtype);
    const char* rows = BlockAt(from, g, b, head, 0) + first * row_bytes;
    for (int64_t n = 0; n < list.size; ++n) {
      const char* block = rows + list.block(n) * g.block_size * row_bytes;
      for (int i = 0; i < kQueriesAtOnce; ++i) {
        LoadRow(block + i * row_bytes, from.dtype, g.block_size, to + i * ld + n * g.block_size);
      }
    }
    for (int i = 0; i < kQueriesAtOnce; ++i) memset(to + i * ld + count(), 0, sizeof(Vec));
  }

  void Scatter(const float* from, int64_t ld, const SpattnArray& to) const {
    const int64_t row_bytes = g.block_size * ElementBytes(to.dtype);
    char* rows = BlockAt(to, g, b, head, 0) + first * row_bytes;
    for (int64_t n = 0; n < list.size; ++n) {
      char* block = rows + list.block(n) * g.block_size * row_bytes;
      for (int i = 0; i < kQueriesAtOnce; ++i) {
        StoreRow(from + i * ld + n * g.block_size, to.dtype, g.block_size, block + i * row_bytes);
      }
    }
  }

  template <class Word>
  void GatherWords(const void* mask, int64_t mask_head, int64_t ld, uint8_t* attends) const {
    for (int i = 0; i < kQueriesAtOnce; ++i) {
      const Word* words =
          static_cast<const Word*>(mask) + (mask_head * g.block_size + first + i) * g.blocks;
      for (int64_t n = 0; n < list.size; ++n) {
        memcpy(attends + i * ld / 8 + n * sizeof(Word), words + list.block(n), sizeof(Word));
      }
    }
  }

  void GatherMask(const SpattnBlocksSoftmax& params, int64_t ld, uint8_t* attends) const {
    const int64_t mask_head = params.mask_heads == 1 ? 0 : head;
    if (g.block_size == 8) GatherWords<uint8_t>(params.mask, mask_head, ld, attends);
    if (g.block_size == 16) GatherWords<uint16_t>(params.mask, mask_head, ld, attends);
    if (g.block_size == 32) GatherWords<uint32_t>(params.mask, mask_head, ld, attends);
    if (g.block_size == 64) GatherWords<uint64_t>(params.mask, mask_head, ld, attends);
  }
};

SPATTN_INLINE IntVec Attends(const uint8_t* attends, int64_t j) {
  uint32_t bits;
  memcpy(&bits, attends + j / 8, sizeof(bits));
  return LanesOfBits(bits >> (j % 8));
}

SPATTN_INLINE float SumOfLanes(Vec v) {
  float sum = 0.0f;
  for (int i = 0; i < kLanes; ++i) sum += v[i];
  return sum;
}

// Turns s into softmax(scale * s), in place.
template <bool kMasked>
inline void SoftmaxQuery(float* row, const uint8_t* attends, int64_t count, float scale) {
  Vec largest = Vec{} - kInf;
  for (int64_t j = 0; j < count; j += kLanes) {
    Vec s = Load(row + j) * scale;
    if (kMasked) s = Select(Attends(attends, j), s, Vec{} + kLowest);
    if (j + kLanes > count) s = Select(LanesOfBits((1u << (count - j)) - 1), s, Vec{} - kInf);
    Store(row + j, s);
    largest = Max(s, largest);
  }
  float max = largest[0];
  for (int i = 1; i < kLanes; ++i) max = largest[i] > max ? largest[i] : max;
  Vec sum{};
  for (int64_t j = 0; j < count; j += kLanes) {
    const Vec p = Exp2((Load(row + j) - max) * kLog2E);
    Store(row + j, p);
    sum += p;
  }
  const float inverse = 1.0f / SumOfLanes(sum);
  for (int64_t j = 0; j < count; j += kLanes) Store(row + j, Load(row + j) * inverse);
}

// Computes dx = scale * y * (dy - sum dy y), in the place of y.
inline void SoftmaxGradQuery(float* y, const float* dy, int64_t count, float scale) {
  Vec products{};
  for (int64_t j = 0; j < count; j += kLanes) products += Load(y + j) * Load(dy + j);
  const float delta = SumOfLanes(products);
  for (int64_t j = 0; j < count; j += kLanes) {
    Store(y + j, (Load(dy + j) - delta) * Load(y + j) * scale);
  }
}

// Calls body(scratch, queries) for all that have a list, and zeroes the blocks of `written` that are
// in none.
template <class Body>
inline void ForQueries(const SpattnBlocksSoftmax& params, const SpattnArray& written,
                       const uint8_t* is_listed, const SpattnThreads& threads, void* workspace,
                       const Body& body) {
  const SpattnBlocks& g = params.blocks;
  const int64_t scratch_bytes = SoftmaxScratchBytes(params);
  const int64_t block_bytes = g.block_size * g.block_size * ElementBytes(written.dtype);
  const int64_t tasks = g.batch * g.heads * g.q_blocks;
  ParallelFor(threads, tasks, [&](int64_t task, int32_t worker) {
    Arena arena(static_cast<char*>(workspace) + worker * scratch_bytes);
    const SoftmaxScratch scratch(&arena, params);
    const int64_t q_block = task % g.q_blocks;
    const int64_t head = task / g.q_blocks % g.heads, b = task / g.q_blocks / g.heads;
    const uint8_t* listed = is_listed + (params.lut.heads == 1 ? 0 : head) * g.blocks;
    for (int64_t block = q_block; block < g.blocks; block += g.q_blocks) {
      if (!listed[block]) memset(BlockAt(written, g, b, head, block), 0, block_bytes);
    }
    const List list(params.lut, head, q_block);
    if (list.size == 0) return;
    for (int64_t first = 0; first < g.block_size; first += kQueriesAtOnce) {
      body(scratch, Queries{g, list, b, head, first});
    }
  });
}

inline void Softmax(const SpattnBlocksSoftmax& params, const uint8_t* is_listed,
                    const SpattnThreads& threads, void* workspace) {
  ForQueries(params, params.y, is_listed, threads, workspace,
             [&](const SoftmaxScratch& x, const Queries& queries) {
               queries.Gather(params.x, x.ld, x.s);
               if (params.mask) queries.GatherMask(params, x.ld, x.attends);
               for (int i = 0; i < kQueriesAtOnce; ++i) {
                 const auto softmax = params.mask ? SoftmaxQuery<true> : SoftmaxQuery<false>;
                 softmax(x.s + i * x.ld, x.attends + i * x.ld / 8, queries.count(), params.scale);
               }
               queries.Scatter(x.s, x.ld, params.y);
             });
}

inline void SoftmaxGrad(const SpattnBlocksSoftmax& params, const uint8_t* is_listed,
                        const SpattnThreads& threads, void* workspace) {
  ForQueries(params, params.dx, is_listed, threads, workspace,
             [&](const SoftmaxScratch& x, const Queries& queries) {
               queries.Gather(params.y, x.ld, x.s);
               queries.Gather(params.dy, x.ld, x.dy);
               for (int i = 0; i < kQueriesAtOnce; ++i) {
                 SoftmaxGradQuery(x.s + i * x.ld, x.dy + i * x.ld, queries.count(), params.scale);
               }
               queries.Scatter(x.s, x.ld, params.dx);
             });
}

// ---- partial autoregressive mask ----

template <class Word>
inline void AutoregressiveMaskRow(const SpattnBlocksMask& params, int64_t head, int64_t i) {
  const SpattnBlocks& g = params.blocks;
  const int32_t* coords = HeadLut(params.lut, head);
  const int64_t offset = (head * g.block_size + i) * g.blocks;
  const Word* from = static_cast<const Word*>(params.mask) + offset;
  Word* to = static_cast<Word*>(params.mask_out) + offset;
  for (int64_t block = 0; block < g.blocks; ++block) {
    const int64_t query = coords[2 * block] * static_cast<int64_t>(g.block_size) + i;
    const int64_t first_key = coords[2 * block + 1] * static_cast<int64_t>(g.block_size);
    const int64_t kept = Max(Min(Max(params.key, query + 1) - first_key, g.block_size), 0);
    const Word keeps = kept == g.block_size ? ~Word{0} : (Word{1} << kept) - 1;
    to[block] = from[block] & keeps;
  }
}

inline void AutoregressiveMask(const SpattnBlocksMask& params, const SpattnThreads& threads) {
  const int64_t block_size = params.blocks.block_size;
  ParallelFor(threads, params.lut.heads * block_size, [&](int64_t task, int32_t) {
    const int64_t head = task / block_size, i = task % block_size;
    if (block_size == 8) AutoregressiveMaskRow<uint8_t>(params, head, i);
    if (block_size == 16) AutoregressiveMaskRow<uint16_t>(params, head, i);
    if (block_size == 32) AutoregressiveMaskRow<uint32_t>(params, head, i);
    if (block_size == 64) AutoregressiveMaskRow<uint64_t>(params, head, i);
  });
}

// ---- what blocksparse.cc calls ----

const BlocksparseKernels kBlocksparseKernels = {
    MatmulWorkspace, SoftmaxWorkspace, Nt,          Xn<kRowMajor>,
    Xn<kColMajor>,   Softmax,          SoftmaxGrad, AutoregressiveMask,
};

}  // namespace SPATTN_ISA
}  // namespace spattn
