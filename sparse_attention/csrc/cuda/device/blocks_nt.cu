// blocks_nt.cu — scores = q kT, block by block.
//
// Math, for block n of head h with places (a, c) = nt_lut[h, n]:
//   scores[b, h, n] = q[b, block a, head h] kv[b, block c, head h]^T       0 where it has no place
//
// Mapping: one CTA per (64 rows of blocks, head, batch) = grid (x, y, z): 64 / block_size blocks,
//          neighbours in the table, so that they share q rows in L2. Each of 4 warps has 16 rows;
//          two blocks of 8 share a warp, which keeps the halves of its product where row and column
//          are of the same block.
// Tiles:   q_smem, kv_smem [64, kChunk], head_dim in chunks
//          s [16, kColumns] f32, registers, of a chunk and of all
// Memory:  smem = 2 * 64 * kChunk * sizeof(T) and padding, 18 KB with head_dim 64; float32 35 KB
// Cost:    2 block_size^2 head_dim FLOP per block; reads 2 block_size head_dim, writes block_size^2
//          elements, so that with 16 bits and head_dim 64 the floor is bytes at every block size:
//          21 FLOP per byte at 64.
// Numerics: products in the type of q and kv (bfloat16 before sm_80: float32), accumulation f32,
//          one rounding to the type of scores. Bitwise deterministic.
#include "cuda/device/blocks.cuh"

namespace spattn {

// ---- config ----

using Row = Element<SPATTN_ROWS>;
using Score = Element<SPATTN_SCORES>;
constexpr int kChunk = SPATTN_CHUNK;
constexpr int kWarps = 4, kThreads = kWarps * 32, kRows = kWarps * 16;
constexpr int kBlocks = kRows / kBlock;    // of a CTA
constexpr int kColumns = Max(kBlock, 16);  // of a warp's product
constexpr int kN = kColumns / 8;
using RowTile = Tile<kRows, kChunk>;

struct Smem {
  static constexpr int kScratch = ScratchBytes<kColumns>();
  static constexpr int kTiles = 2 * RowTile::kBytes;
  static constexpr int kBytes = Max(kTiles + kWarps * kScratch, kWarps* StageBytes(kColumns));
};
static_assert(Smem::kBytes == SPATTN_SHARED_MEMORY, "the host counts other bytes");
static_assert(kRows * kChunk / kUnit % kThreads == 0, "whole warps load");

// ---- kernel ----

// Without a number of CTAs in the launch bounds the compiler aims for more of them, and spills.
extern "C" __global__ void __launch_bounds__(kThreads, 1)
    blocks_nt(const __grid_constant__ SpattnBlocksMatmul params) {
  extern __shared__ __align__(128) unsigned char smem[];
  const SpattnBlocks& g = params.blocks;
  const int64_t first_block = static_cast<int64_t>(blockIdx.x) * kBlocks;
  const int head = blockIdx.y, batch = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  T *q_smem = reinterpret_cast<T*>(smem), *kv_smem = q_smem + RowTile::kBytes / sizeof(T);
  float* scratch = reinterpret_cast<float*>(smem + Smem::kTiles + warp * Smem::kScratch);
  const auto q = HeadRows<const Row>::Make(params.q, params, g.q_blocks, batch, head);
  const auto kv = HeadRows<const Row>::Make(params.kv, params, g.kv_blocks, batch, head);
  // Lane i of every warp has the place of the CTA's block i.
  Pair places{-1, -1};
  if (lane < kBlocks && first_block + lane < g.blocks) {
    places = Pair::Read(HeadLut(params.lut, head) + first_block + lane, g.q_blocks, g.kv_blocks);
  }

  float s[1][kN][4] = {};
#pragma unroll 1
  for (int first = 0; first < params.head_dim; first += kChunk) {
#pragma unroll
    for (int i = 0; i < kRows * kChunk / kUnit / kThreads; ++i) {
      const int index = threadIdx.x + i * kThreads;
      const int r = index / (kChunk / kUnit), column = index % (kChunk / kUnit) * kUnit;
      const Pair place = places.Of(r / kBlock);
      const bool exists = place.block >= 0 && first + column < params.head_dim;
      const int from = exists ? first + column : 0, to = RowTile::Offset(r, column);
      CopyUnit(q_smem + to, q.Row(Max(place.block, 0), r % kBlock) + from, exists);
      CopyUnit(kv_smem + to, kv.Row(Max(place.other, 0), r % kBlock) + from, exists);
    }
    CopyCommit();
    CopyWait<0>();
    __syncthreads();
    RowOperand<1, RowTile, false> rows;
    rows.Load(q_smem, warp * 16);
    const int first_column =
        warp * 16 / kColumns * kColumns;  // the tile's rows of the warp's blocks
    float chunk[1][kN][4];
    const auto columns = SmemOperand::Make(kv_smem + first_column * RowTile::kRowPitch);
    MatmulABt<RowTile>(chunk, rows, columns, scratch);
#pragma unroll
    for (int j = 0; j < kN * 4; ++j) s[0][j / 4][j % 4] += chunk[0][j / 4][j % 4];
    __syncthreads();  // every warp has left the tiles
  }

  // ---- epilogue ----

  float* stage = reinterpret_cast<float*>(smem + warp * StageBytes(kColumns));
  StoreUnits<kBlockUnits>(
      s, stage,
      [&](int r, int u) -> Score* {
        const int row = warp * 16 + r;
        const int64_t block = first_block + row / kBlock;
        if (block >= g.blocks) return nullptr;
        return BlockAt<Score>(params.scores, g, batch, head, block) + row % kBlock * kBlock +
               u * kUnit;
      },
      [](int r) { return kBlock < 16 ? r / kBlock * kBlock : 0; });
}

}  // namespace spattn
