// device.cuh — what every kernel here stands on: element types, asynchronous copies, row
// addressing, block lists and mask bits. No header of the CUDA toolkit is needed: NVRTC has none.
// Compiled with --device-as-default-execution-space: what has no __global__ is device code.
//
// Macros that the compiling side sets, beside each kernel's own:
//   SPATTN_DTYPE        0 float32, 1 float16, 2 bfloat16      (SpattnDtype)
//   SPATTN_TF32         1 to multiply float32 on tensor cores, its factors rounded to TF32 (sm_80 up)
//   SPATTN_ROW_STRIDED  1 where problem.row_stride > 1
//   SPATTN_ANEW         1 to derive addresses anew for each tile (Anew)
//   SPATTN_WGMMA        1 to multiply with sm_90a's wgmma (16-bit types; passing and owned tiles of
//                       whole 64 rows)
//   SPATTN_RULE         what of a score rule is in use (SpattnRuleParts, score_rule.cuh); none: not set
#pragma once
#include "cuda/device/params.h"

#define DEVICE static __forceinline__

#ifndef SPATTN_RULE
#define SPATTN_RULE 0
#endif

namespace spattn {

// ---- element types ----

struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

template <bool kIsFirst, typename First, typename Second>
struct Choose {
  using Type = First;
};
template <typename First, typename Second>
struct Choose<false, First, Second> {
  using Type = Second;
};

// The C++ type of the elements of a SpattnDtype.
template <int kDtype>
using Element =
    typename Choose<kDtype == 0, float, typename Choose<kDtype == 1, Half, Bfloat16>::Type>::Type;

using T = Element<SPATTN_DTYPE>;
static_assert(SPATTN_DTYPE != 2 || __CUDA_ARCH__ >= 800, "bfloat16 needs sm_80");

constexpr bool kIsFloat = sizeof(T) == 4;
constexpr bool kIsExact = kIsFloat && !SPATTN_TF32;  // float32 throughout
constexpr int kVector = 16 / sizeof(T);              // elements in a 16-byte access
constexpr float kInf = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kLog2e = 1.4426950408889634f;
// Exponentials are powers of 2, which is one instruction; where all is float32 they are powers of e,
// since a product with log2(e) would cost a bit.
constexpr float kExpScale = kIsExact ? 1 : kLog2e;
constexpr unsigned kFullWarp = 0xffffffffu;

struct True {
  static constexpr bool kValue = true;
  constexpr operator bool() const { return true; }
};
struct False {
  static constexpr bool kValue = false;
  constexpr operator bool() const { return false; }
};

constexpr int Max(int a, int b) { return a > b ? a : b; }
constexpr int Min(int a, int b) { return a < b ? a : b; }
constexpr int CeilDiv(int a, int b) { return (a + b - 1) / b; }
constexpr int RoundUp(int a, int b) { return CeilDiv(a, b) * b; }

// Rounds a dim up to whole matrix fragments.
constexpr int PaddedDim(int dim) { return RoundUp(dim, 16); }

// Two adjacent elements in one register (16-bit types only); lo is the lower address.
DEVICE uint32_t PackPair(float lo, float hi) {
  uint32_t r;
#if SPATTN_DTYPE == 2
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#elif __CUDA_ARCH__ >= 800
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
#else
  asm("{.reg .b16 l, h;\n cvt.rn.f16.f32 l, %1;\n cvt.rn.f16.f32 h, %2;\n mov.b32 %0, {l, h};}"
      : "=r"(r)
      : "f"(lo), "f"(hi));
#endif
  return r;
}

DEVICE float ToFloat(float x) { return x; }
DEVICE float ToFloat(Bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
DEVICE float ToFloat(Half x) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(x.bits));
  return r;
}

DEVICE void StorePair(float* p, float lo, float hi) { *reinterpret_cast<float2*>(p) = {lo, hi}; }
template <typename E>
DEVICE void StorePair(E* p, float lo, float hi) {
  *reinterpret_cast<uint32_t*>(p) = PackPair(lo, hi);
}

// Returns 2^x, and where all is float32 e^x (see kExpScale).
DEVICE float Exp(float x) {
  if (kIsExact) return expf(x);
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Inf and NaN: all bits of the exponent are set.
constexpr uint32_t kExponent = SPATTN_DTYPE == 0   ? 0x7f800000u
                               : SPATTN_DTYPE == 1 ? 0x7c007c00u
                                                   : 0x7f807f80u;
constexpr uint32_t kExponentUnit = SPATTN_DTYPE == 0   ? 0x00800000u
                                   : SPATTN_DTYPE == 1 ? 0x04000400u
                                                       : 0x00800080u;
constexpr uint32_t kSigns = kIsFloat ? 0x80000000u : 0x80008000u;

// The signs of elements that are not finite: one more in the exponent carries into them.
DEVICE uint32_t Nonfinite(uint32_t word) { return ((word & kExponent) + kExponentUnit) & kSigns; }

// Replaces Inf and NaN elements of 16 bytes by 0; true if there were any, which is rare.
DEVICE bool ZeroNonfinite(uint4* vector) {
  const uint4 v = *vector;
  const uint32_t found = Nonfinite(v.x) | Nonfinite(v.y) | Nonfinite(v.z) | Nonfinite(v.w);
  if (found == 0) return false;
  uint32_t* word = reinterpret_cast<uint32_t*>(vector);
  constexpr int kBits = kIsFloat ? 32 : 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t ends = Nonfinite(word[i]) >> (kBits - 1);  // a 1 for each
    word[i] &= ~(kIsFloat ? 0u - ends : ends * 0xffffu);
  }
  return true;
}

// ---- asynchronous copies ----

DEVICE uint32_t SmemAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies kBytes (4, 8 or 16) from device to shared memory, or writes zeros where !valid.
template <int kBytes>
DEVICE void CopyAsync(void* dst, const void* src, bool valid) {
#if __CUDA_ARCH__ >= 800
  const int bytes = valid ? kBytes : 0;
  if (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SmemAddress(dst)), "l"(src),
                 "r"(bytes));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(SmemAddress(dst)), "l"(src),
                 "n"(kBytes), "r"(bytes));
  }
#else
  const uint32_t* from = static_cast<const uint32_t*>(src);
  uint32_t* to = static_cast<uint32_t*>(dst);
  if (kBytes == 16) {
    *reinterpret_cast<uint4*>(to) =
        valid ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
  } else {
#pragma unroll
    for (int i = 0; i < kBytes / 4; ++i) to[i] = valid ? __ldg(from + i) : 0;
  }
#endif
}

DEVICE void CopyCommit() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most kPending of this thread's groups of copies are under way.
template <int kPending>
DEVICE void CopyWait() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// ---- tiles in shared memory ----

constexpr bool kHasWgmma = SPATTN_WGMMA;
constexpr int kTileAlign = kHasWgmma ? 1024 : 16;  // bytes

// kRows rows of kDim elements. Either way the 8 rows that one matrix load takes lie in different
// banks:
//   padded    by 16 bytes, so that a row is an odd number of 16-byte units
//   swizzled  as wgmma reads it: panels of 64 columns, each row's 16-byte units permuted by row mod
//             8; the last panel holds zeros in the columns past the dim
template <int kRows, int kDim>
struct Tile {
  static constexpr int kDimension = kDim;
  static constexpr int kRowPitch = kHasWgmma ? 64 : PaddedDim(kDim) + kVector;
  static constexpr int kPanel = kRows * 64;  // elements, swizzled
  static constexpr int kPanels = CeilDiv(kDim, 64);
  static constexpr int kColumns = kHasWgmma ? kPanels * 64 : PaddedDim(kDim);  // that are written
  static constexpr int kSize = kRows * (kHasWgmma ? kColumns : kRowPitch);     // elements
  static constexpr int kBytes = kSize * static_cast<int>(sizeof(T));
  static_assert(!kHasWgmma || kRows % 8 == 0, "wgmma reads whole swizzled panels");

  // Elements from the tile's start to a column that begins a 16-byte unit.
  DEVICE int Offset(int row, int column) {
    if (!kHasWgmma) return row * kRowPitch + column;
    return column / 64 * kPanel + row * 64 + ((column / 8 ^ row) & 7) * 8;
  }
};

// Makes what this thread wrote to shared memory visible to wgmma; a barrier must follow.
DEVICE void FenceForWgmma() {
  if constexpr (kHasWgmma) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- rows ----

// Where positions lie (core.h, SpattnProblem.row_stride): position -> row, or -1 where there is
// none.
struct RowMap {
  int limit;          // rows at or past it do not exist
  int stride, chunk;  // chunk = ceil(rows / stride) positions of one residue
  int positions;
  unsigned inverse;  // floor((2^32 - 1) / chunk): a division costs one multiplication

  DEVICE RowMap Make(int64_t rows, int64_t stride, int64_t limit) {
    RowMap map;
    map.limit = static_cast<int>(limit < 0 ? 0 : limit < rows ? limit : rows);
    map.stride = static_cast<int>(stride);
    map.chunk = SPATTN_ROW_STRIDED ? static_cast<int>((rows + stride - 1) / stride)
                                   : static_cast<int>(rows);
    map.positions = map.chunk * map.stride;
    map.inverse = SPATTN_ROW_STRIDED ? 0xffffffffu / static_cast<unsigned>(map.chunk) : 0;
    return map;
  }
  // position / chunk: the estimate is at most one too small below 2^31.
  __forceinline__ int Residue(int position) const {
    if (!SPATTN_ROW_STRIDED) return 0;
    const int estimate = static_cast<int>(__umulhi(static_cast<unsigned>(position), inverse));
    return position - estimate * chunk >= chunk ? estimate + 1 : estimate;
  }
  // The row of a position that is known to exist.
  __forceinline__ int ExistingRow(int position) const {
    if (!SPATTN_ROW_STRIDED) return position;
    const int residue = Residue(position);
    return (position - residue * chunk) * stride + residue;
  }
  __forceinline__ int Row(int position) const {
    if (position < 0 || (SPATTN_ROW_STRIDED && position >= positions)) return -1;
    const int row = ExistingRow(position);
    return row < limit ? row : -1;
  }
  // Whether all of [position, position + count) exist; false where only a closer look could tell.
  __forceinline__ bool AllExist(int position, int count) const {
    if (!SPATTN_ROW_STRIDED) return position + count <= limit;
    const int last = position + count - 1;
    return last < positions && Residue(position) == Residue(last) && Row(last) >= 0;
  }
};

// One head of one sequence of a tensor [batch, rows, heads, dim]. The host sees to it that a row's
// stride in bytes fits 32 bits: then an address is one widening multiply-add.
struct RowSpan {
  unsigned char* data;
  int row_bytes;

  DEVICE RowSpan Make(const SpattnTensor& tensor, int batch, int head) {
    T* data =
        static_cast<T*>(tensor.data) + batch * tensor.batch_stride + head * tensor.head_stride;
    return {reinterpret_cast<unsigned char*>(data),
            static_cast<int>(tensor.row_stride * sizeof(T))};
  }
  __forceinline__ T* Row(int row) const {
    return reinterpret_cast<T*>(data + static_cast<int64_t>(row) * row_bytes);
  }
  // The rows from a column on.
  __forceinline__ RowSpan From(int column) const {
    RowSpan span{data + column * static_cast<int>(sizeof(T)), row_bytes};
    asm("" : "+l"(span.data));  // one sum, not one for every row
    return span;
  }
};

// The value, unknown to the compiler, which then derives from it in every turn of a loop what it
// would keep in registers through all of them.
DEVICE unsigned Opaque(unsigned value) {
  asm volatile("" : "+r"(value));
  return value;
}
DEVICE unsigned Anew(unsigned value) { return SPATTN_ANEW ? Opaque(value) : value; }

// Chunks of 16 bytes of a tile, shared among the threads of a CTA: the i-th of this thread.
template <int kRows, int kDim, int kThreads>
struct ThreadChunk {
  static constexpr int kRowChunks = Tile<kRows, kDim>::kColumns / kVector,
                       kPassRows = kThreads / kRowChunks;
  static constexpr int kCount = CeilDiv(kRows * kRowChunks, kThreads);
  // Where a pass is whole rows, a thread keeps its column and steps a fixed way through the tile.
  static constexpr bool kSteady = kThreads % kRowChunks == 0 && kPassRows % 8 == 0;
  static constexpr int kStep = kSteady ? kPassRows * Tile<kRows, kDim>::kRowPitch : 0;
  int row, column, offset;  // without i * kStep, which is for the instruction to add: registers

  DEVICE ThreadChunk Make(int i, unsigned thread) {
    const unsigned index = thread + (kSteady ? 0 : i * kThreads);
    const int row = index / kRowChunks, column = index % kRowChunks * kVector;
    return {row + (kSteady ? i * kPassRows : 0), column, Tile<kRows, kDim>::Offset(row, column)};
  }
  __forceinline__ bool IsInTile() const {
    return kRows * kRowChunks % kThreads == 0 || row < kRows;
  }
};

template <int kRows, int kDim, int kThreads, bool kAllExist, int kTensors, typename RowOf>
DEVICE void LoadRowsOf(T* const (&tiles)[kTensors], const RowSpan (&from)[kTensors], RowOf row_of,
                       unsigned first_thread) {
  using Chunk = ThreadChunk<kRows, kDim, kThreads>;
  const unsigned thread = Anew(threadIdx.x - first_thread);
#pragma unroll
  for (int i = 0; i < Chunk::kCount; ++i) {
    const Chunk chunk = Chunk::Make(i, thread);
    const bool is_column = kDim == Tile<kRows, kDim>::kColumns || chunk.column < kDim;
    const int row = row_of(chunk.IsInTile() ? chunk.row : 0);
    const bool exists = (kAllExist || row >= 0) && is_column;
    if (!chunk.IsInTile()) continue;
#pragma unroll
    for (int t = 0; t < kTensors; ++t) {
      const RowSpan columns = from[t].From(is_column ? chunk.column : 0);
      CopyAsync<16>(tiles[t] + chunk.offset + i * Chunk::kStep,
                    columns.Row(kAllExist ? row : Max(row, 0)), exists);
    }
  }
}

// Loads kRows rows of kDim elements into a tile, zeros for rows that are not there and for the
// padding of the dim. kThreads threads of the CTA call it, from first_thread on. row_of(r) gives a row
// or -1 (kAllExist: never) and may use whole-warp shuffles.
template <int kRows, int kDim, int kThreads, bool kAllExist, typename RowOf>
DEVICE void LoadRows(T* tile, const RowSpan& from, RowOf row_of, unsigned first_thread = 0) {
  LoadRowsOf<kRows, kDim, kThreads, kAllExist, 1>({tile}, {from}, row_of, first_thread);
}

// Does the same for two tensors that have the same rows.
template <int kRows, int kDimA, int kDimB, int kThreads, bool kAllExist, typename RowOf>
DEVICE void LoadRowPair(T* tile_a, const RowSpan& a, T* tile_b, const RowSpan& b, RowOf row_of) {
  if constexpr (kDimA == kDimB) {
    LoadRowsOf<kRows, kDimA, kThreads, kAllExist, 2>({tile_a, tile_b}, {a, b}, row_of, 0);
  } else {
    LoadRows<kRows, kDimA, kThreads, kAllExist>(tile_a, a, row_of);
    LoadRows<kRows, kDimB, kThreads, kAllExist>(tile_b, b, row_of);
  }
}

// Zeroes the non-finite elements that this thread itself loaded with LoadRows (before any barrier:
// its own copies are visible to it once it has waited for them); true if there were any.
template <int kRows, int kDim, int kThreads>
DEVICE bool ZeroNonfiniteRows(T* tile) {
  using Chunk = ThreadChunk<kRows, kDim, kThreads>;
  const unsigned thread = Anew(threadIdx.x);
  bool found = false;
#pragma unroll
  for (int i = 0; i < Chunk::kCount; ++i) {
    const Chunk chunk = Chunk::Make(i, thread);
    T* at = tile + chunk.offset + i * Chunk::kStep;
    if (chunk.IsInTile()) found |= ZeroNonfinite(reinterpret_cast<uint4*>(at));
  }
  return found;
}

// ---- block lists ----

constexpr bool kHasSegments = SPATTN_RULE & SPATTN_RULE_SEGMENTS;
constexpr bool kHasMask = SPATTN_RULE & SPATTN_RULE_MASK;
// Whether score_rule_lists.cu has written lists of what the rule leaves of a plan, for each sequence.
constexpr bool kLeavesLists = kHasSegments || kHasMask;

// Beside a mask id of such a list: not all pairs of the block and the tile may attend.
constexpr int kCheckPairs = 1 << 30;

// An entry of mask_ids.
struct MaskId {
  int id;           // -1: FULL
  bool is_checked;  // for segments and mask

  DEVICE MaskId Of(int32_t entry) {
    if (!kLeavesLists) return {entry, false};
    return {(entry & (kCheckPairs - 1)) - 1, (entry & kCheckPairs) != 0};
  }
};

// A passing tile of kTile positions is kGather plan blocks, or 1 / kSplit of one. Lane g of every
// warp holds what block g of the tile is.
struct Blocks {
  int block, mask_id;  // as read; block -1: none
  int sub;             // which part of the block, where kSplit > 1
  bool is_checked;     // for segments and mask

  // Whether bits say which of its pairs are allowed.
  __forceinline__ bool IsPartial() const { return is_checked || mask_id >= 0; }
};

// A position as that of a run of neighbours, which many columns share, and a constant.
struct FragmentColumn {
  int run, within;
};

template <int kTile, int kPlanBlock>
struct BlockList {
  static constexpr int kGather = Max(kTile / kPlanBlock, 1);
  static constexpr int kSplit = Max(kPlanBlock / kTile, 1);
  static constexpr int kRun = Min(kTile, kPlanBlock);  // positions that one block gives to a tile
  static_assert(kTile % kRun == 0 && kPlanBlock % kRun == 0 && kGather <= 32 && kTile % 32 == 0,
                "tile shape");

  const int32_t* indices;
  const int32_t* mask_ids;
  int blocks, mask_blocks, begin, end;

  // The list of one tile of one plan head.
  DEVICE BlockList Make(const SpattnTilePlan& plan, int plan_head, int tile) {
    const int at = plan_head * plan.tiles + tile;
    const int begin = Min(Max(__ldg(plan.indptr + at), 0), plan.entries),
              end = Min(__ldg(plan.indptr + at + 1), plan.entries);
    return {plan.indices, plan.mask_ids, plan.blocks, plan.mask_blocks, begin, Max(begin, end)};
  }
  // What a rule has left of it for a sequence (SpattnCudaRule): `ends` of all lists.
  DEVICE BlockList MakeLeft(const SpattnTilePlan& plan, int plan_head, int tile, int batch,
                            const int32_t* ends) {
    BlockList list = Make(plan, plan_head, tile);
    if (!kLeavesLists) return list;
    const int64_t lists = static_cast<int64_t>(batch) * plan.heads * plan.tiles;
    list.end = Min(__ldg(ends + lists + plan_head * plan.tiles + tile), plan.entries);
    list.indices += static_cast<int64_t>(batch) * plan.entries;
    list.mask_ids += static_cast<int64_t>(batch) * plan.entries;
    return list;
  }
  __forceinline__ int Tiles() const { return CeilDiv((end - begin) * kSplit, kGather); }

  // Reads the blocks of passing tile n; used one tile later, so that the reads have time to come
  // back.
  __forceinline__ Blocks Fetch(int n) const {
    Blocks fetched{-1, -1, n % kSplit, false};
    const int lane = Anew(threadIdx.x) % 32;
    const int at = begin + (kSplit > 1 ? n / kSplit : n * kGather + lane);
    if (lane < kGather && at < end) {
      fetched.block = __ldg(indices + at);
      const MaskId mask = MaskId::Of(__ldg(mask_ids + at));
      fetched.mask_id = mask.id, fetched.is_checked = mask.is_checked;
    }
    return fetched;
  }
  // First position of this lane's block, or -1; and the row of mask_bits where its bits begin, or
  // -1.
  __forceinline__ int FirstPosition(const Blocks& b) const {
    const bool valid = static_cast<unsigned>(b.block) < static_cast<unsigned>(blocks) &&
                       b.mask_id >= -1 && b.mask_id < mask_blocks;
    return valid ? b.block * kPlanBlock + b.sub * kTile : -1;
  }
  // The position of row r of the tile, or -1. Whole warps.
  __forceinline__ int Position(const Blocks& b, unsigned r) const {
    const int first = __shfl_sync(kFullWarp, FirstPosition(b), r / kRun);
    return first < 0 ? -1 : first + static_cast<int>(r % kRun);
  }
  // Where this lane's first column of a matrix fragment lies that begins at row r of the tile; of no
  // use where the block is not there. Whole warps.
  __forceinline__ FragmentColumn Column(const Blocks& b, unsigned r) const {
    return {Position(b, r / kRun * kRun) + static_cast<int>(threadIdx.x % 4 * 2),
            static_cast<int>(r % kRun)};
  }
  // The same as Position, for a tile of which every block is known to be there.
  __forceinline__ int ExistingPosition(const Blocks& b, unsigned r) const {
    return __shfl_sync(kFullWarp, b.block, r / kRun) * kPlanBlock + b.sub * kTile +
           static_cast<int>(r % kRun);
  }
  __forceinline__ int MaskRow(const Blocks& b) const {
    return b.mask_id < 0 ? -1 : b.mask_id * kPlanBlock + b.sub * kTile;
  }
};

// ---- mask bits ----

// Words of mask in shared memory for one passing row: a bit for each of the tile's rows.
constexpr int MaskWords(int tile_rows) { return Max(CeilDiv(tile_rows, 32), 1); }

// Brings the bits of a passing tile: from the plan where a block is PARTIAL, all ones where it is
// FULL, zeros where the row does not exist. `restriction` takes bits away, where there is a rule.
template <int kPlanTile, int kThreads, typename List, typename Restriction>
DEVICE void LoadMask(uint32_t* mask_smem, const List& list, const Blocks& blocks,
                     const uint8_t* mask_bits, const RowMap& rows, const Restriction& restriction) {
  constexpr int kBytes = kPlanTile / 8, kWords = MaskWords(kPlanTile),
                kTile = List::kRun * List::kGather;
  const unsigned thread = Anew(threadIdx.x);
  const int first = list.FirstPosition(blocks), mask_row = list.MaskRow(blocks);
#pragma unroll
  for (int i = 0; i < CeilDiv(kTile, kThreads); ++i) {
    const unsigned r = thread + i * kThreads;
    if (r >= kTile) break;  // whole warps: kTile is a multiple of 32
    const int run_first = __shfl_sync(kFullWarp, first, r / List::kRun);
    const int run_mask = __shfl_sync(kFullWarp, mask_row, r / List::kRun);
    uint32_t* to = mask_smem + r * kWords;
    if constexpr (kLeavesLists) {
      const int row = run_first >= 0 ? rows.Row(run_first + r % List::kRun) : -1;
      uint32_t words[kWords];
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[w] = row >= 0 ? kFullWarp : 0;
      if (row >= 0 && run_mask >= 0) {
        const uint8_t* from = mask_bits + static_cast<int64_t>(run_mask + r % List::kRun) * kBytes;
#pragma unroll
        for (int w = 0; w < kWords; ++w) {
          words[w] = kBytes >= 4   ? reinterpret_cast<const uint32_t*>(from)[w]
                     : kBytes == 2 ? *reinterpret_cast<const uint16_t*>(from)
                                   : *from;
        }
      }
      restriction.Apply(words, row, __shfl_sync(kFullWarp, blocks.is_checked, r / List::kRun));
#pragma unroll
      for (int w = 0; w < kWords; ++w) to[w] = words[w];
      continue;
    }
    const bool exists = run_first >= 0 && rows.Row(run_first + r % List::kRun) >= 0;
    if (exists && run_mask >= 0) {
      const uint8_t* from = mask_bits + static_cast<int64_t>(run_mask + r % List::kRun) * kBytes;
      if constexpr (kBytes >= 4) {
        CopyAsync<kBytes>(to, from, true);
      } else {
        *to = kBytes == 2 ? *reinterpret_cast<const uint16_t*>(from) : *from;
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) to[w] = exists ? kFullWarp : 0;
    }
  }
}

// The bits of this warp's kRows rows (16 or 32) for one passing row, from row `first_row` on;
// those of other warps may follow.
template <int kPlanTile, int kRows>
DEVICE uint32_t MaskWord(const uint32_t* mask_smem, int passing_row, int first_row) {
  const int bit = threadIdx.x / 32 * kRows;
  return mask_smem[passing_row * MaskWords(kPlanTile) + bit / 32] >> (bit % 32 + first_row);
}

// The bits of this lane's accumulator rows for one passing row: bit 16 m + 8 h is row 8 h of
// fragment m.
template <int kPlanTile, int kRows>
DEVICE uint32_t LaneMask(const uint32_t* mask_smem, int passing_row) {
  return MaskWord<kPlanTile, kRows>(mask_smem, passing_row, threadIdx.x % 32 / 4);
}

// The same for column 8 n + 2 (lane % 4) + j of a matrix fragment that begins at the passing row
// `first`.
template <int kPlanTile, int kRows>
DEVICE uint32_t FragmentMask(const uint32_t* mask_smem, int first, int n, int j) {
  return LaneMask<kPlanTile, kRows>(mask_smem, first + n * 8 + threadIdx.x % 4 * 2 + j);
}

// Whether any of the rows that multiply together (the warp's kRows; with wgmma the warpgroup's 64)
// is paired with any of kCount passing rows from `first`.
template <int kPlanTile, int kRows, int kCount>
DEVICE bool AnyAllowed(const uint32_t* mask_smem, int first) {
  constexpr int kWords = MaskWords(kPlanTile);
  uint32_t bits = 0;
#pragma unroll
  for (int i = 0; i < kCount; i += 32) {
    const int row = first + i + threadIdx.x % 32;
    if (kHasWgmma) {
      const uint32_t* words = mask_smem + row * kWords + threadIdx.x / 128 * 2;
      bits |= words[0] | words[1];
    } else {
      bits |= MaskWord<kPlanTile, kRows>(mask_smem, row, 0) << (32 - kRows);
    }
  }
  return __any_sync(kFullWarp, bits != 0);
}

}  // namespace spattn
