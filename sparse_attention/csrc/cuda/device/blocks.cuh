// blocks.cuh — what the kernels of the three-op family share: elements of any type in units of 8,
// the places of blocks and rows in their tensors, look-up tables, and the way of a product to
// memory.
//
// Beside device.cuh's macros: SPATTN_BLOCK, the block size. SPATTN_DTYPE is the type that products
// are computed in; elements are widened on their way in where they have another.
#pragma once
#include "cuda/device/blocks_params.h"
#include "cuda/device/matmul.cuh"

namespace spattn {

constexpr int kBlock = SPATTN_BLOCK;
constexpr int kUnit = 8;  // elements that move together: dims and block sizes are multiples of it
constexpr int kBlockUnits = kBlock / kUnit;

// ---- elements ----

DEVICE void Round(float x, float* to) { *to = x; }
DEVICE void Round(float x, Half* to) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(to->bits) : "f"(x)); }
DEVICE void Round(float x, Bfloat16* to) {
#if __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(to->bits) : "f"(x));
#else
  const uint32_t bits = __float_as_uint(x);
  to->bits = static_cast<uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
#endif
}

template <typename E>
DEVICE void ReadUnit(const E* from, float (&to)[kUnit]) {
  constexpr int kPiece = 16 / sizeof(E);
#pragma unroll
  for (int i = 0; i < kUnit; i += kPiece) {
    const uint4 words = *reinterpret_cast<const uint4*>(from + i);
    const E* elements = reinterpret_cast<const E*>(&words);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) to[i + j] = ToFloat(elements[j]);
  }
}

template <typename E>
DEVICE void WriteUnit(const float (&from)[kUnit], E* to) {
  constexpr int kPiece = 16 / sizeof(E);
#pragma unroll
  for (int i = 0; i < kUnit; i += kPiece) {
    uint4 words;
    E* elements = reinterpret_cast<E*>(&words);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) Round(from[i + j], elements + j);
    *reinterpret_cast<uint4*>(to + i) = words;
  }
}

// Brings a unit from device to shared memory, or zeros where !valid: asynchronously if its type is
// T.
DEVICE void CopyUnit(T* to, const T* from, bool valid) {
#pragma unroll
  for (int i = 0; i < kUnit; i += kVector) CopyAsync<16>(to + i, from + i, valid);
}
template <typename E>
DEVICE void CopyUnit(float* to, const E* from, bool valid) {
  float unit[kUnit] = {};
  if (valid) ReadUnit(from, unit);
  WriteUnit(unit, to);
}

// ---- places ----

template <typename E>
DEVICE E* BlockAt(const SpattnArray& array, const SpattnBlocks& g, int batch, int head,
                  int64_t block) {
  const int64_t index = (static_cast<int64_t>(batch) * g.heads + head) * g.blocks + block;
  return static_cast<E*>(array.data) + index * (kBlock * kBlock);
}

// The rows of one head in a tensor [batch, row_blocks * block_size, heads * head_dim].
template <typename E>
struct HeadRows {
  E* data;
  int64_t stride;

  DEVICE HeadRows Make(const SpattnArray& array, const SpattnBlocksMatmul& params,
                       int64_t row_blocks, int batch, int head) {
    const int64_t stride = params.blocks.heads * params.head_dim;
    E* data =
        static_cast<E*>(array.data) + batch * row_blocks * kBlock * stride + head * params.head_dim;
    return {data, stride};
  }
  // A row of a block of rows.
  __forceinline__ E* Row(int block, int row) const {
    return data + (static_cast<int64_t>(block) * kBlock + row) * stride;
  }
};

// ---- look-up tables ----

DEVICE const int2* HeadLut(const SpattnLut& lut, int head) {
  return reinterpret_cast<const int2*>(lut.data) + (lut.heads == 1 ? 0 : head) * lut.entries;
}

// A pair of a table that is in range, or (-1, -1). In nt the pair is (q block, kv block).
struct Pair {
  int block, other;

  DEVICE Pair Read(const int2* from, int64_t blocks, int64_t others) {
    const int2 pair = __ldg(from);
    const bool is_valid = pair.x >= 0 && pair.x < blocks && pair.y >= 0 && pair.y < others;
    return is_valid ? Pair{pair.x, pair.y} : Pair{-1, -1};
  }
  // The pair that lane `lane` holds. Whole warps.
  __forceinline__ Pair Of(int lane) const {
    return {__shfl_sync(kFullWarp, block, lane), __shfl_sync(kFullWarp, other, lane)};
  }
};

// The list of one row of blocks in nn_lut or tn_lut, as far as the table holds it.
struct List {
  const int2* pairs;
  int size;
  int64_t blocks, others;

  DEVICE List Make(const SpattnLut& lut, int head, int row, int64_t rows, int64_t blocks,
                   int64_t others) {
    const int2* pairs = HeadLut(lut, head);
    const int2 header = __ldg(pairs + row);
    const int64_t offset = header.x;
    int64_t size = lut.entries - offset;
    size = size < header.y ? size : header.y;
    size = size < lut.longest ? size : lut.longest;
    if (offset < rows || size < 0) return {pairs, 0, blocks, others};
    return {pairs + offset, static_cast<int>(size), blocks, others};
  }
  __forceinline__ Pair Fetch(int at) const {
    return at < size ? Pair::Read(pairs + at, blocks, others) : Pair{-1, -1};
  }
};

// ---- to memory ----

constexpr int StagePitch(int columns) { return columns + 8; }  // floats: rows in different banks
constexpr int StageBytes(int columns) { return 16 * StagePitch(columns) * 4; }  // of a warp

// Writes units of a warp's 16 rows, through StageBytes of shared memory of its own. unit_of(r, u)
// says where unit u of the kRowUnits of row r goes, or null; they begin at column first_of(r).
template <int kRowUnits, int kN, typename UnitOf, typename FirstOf>
DEVICE void StoreUnits(const float (&c)[1][kN][4], float* stage, UnitOf unit_of, FirstOf first_of) {
  constexpr int kPitch = StagePitch(kN * 8);
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
    float* at = stage + lane / 4 * kPitch + n * 8 + lane % 4 * 2;
    StorePair(at, c[0][n][0], c[0][n][1]);
    StorePair(at + 8 * kPitch, c[0][n][2], c[0][n][3]);
  }
  __syncwarp();
#pragma unroll
  for (int i = lane; i < 16 * kRowUnits; i += 32) {
    const int r = i / kRowUnits, u = i % kRowUnits;
    auto* to = unit_of(r, u);
    if (to == nullptr) continue;
    float unit[kUnit];
    ReadUnit(stage + r * kPitch + first_of(r) + u * kUnit, unit);
    WriteUnit(unit, to);
  }
}

}  // namespace spattn
