// blocks_xn.cu — nn: q = scores kv; tn (SPATTN_TRANSPOSED): kv = scores^T q.
//
// Math, for row block a of head h (sums run over the (n, c) of its list):
//   nn  q[b, block a, head h]  = sum scores[b, h, n] kv[b, block c, head h]
//   tn  kv[b, block a, head h] = sum scores[b, h, n]^T q[b, block c, head h]   no list: 0
//
// Mapping: one CTA per (row block and kChunk columns of head_dim, head, batch) = grid (x, y, z),
//          the chunks of a row block together, so that they share its scores in L2; nn takes the
//          last row blocks first and tn the first (causal lists are longest there). A warp has 16
//          rows.
// Tiles:   w_smem [kStages][nn: block_size, kPassing; tn: kPassing, block_size]
//          x_smem [kStages][kPassing, kChunk], rows gathered from kPassing / block_size entries
//          w_frag [16, kPassing], sum [16, kChunk] f32, registers
// Stages:  load(n + 1) | sum += w x
// Memory:  smem = kStages * kPassing * (block_size + kChunk) * sizeof(T) and padding, 37 KB with
//          blocks of 64 and head_dim 64
// Cost:    2 block_size^2 head_dim FLOP per entry; reads block_size^2 scores for each kChunk
//          columns and block_size head_dim elements per entry, writes block_size head_dim per row
//          block: with 16 bits and head_dim 64 bytes are the floor, 32 FLOP per byte at 64.
// Numerics: products in the type that rows and scores share if it has 16 bits, else (and bfloat16
//          before sm_80) float32; accumulation f32, with float32 a tile's sum apart, so that errors
//          grow with the number of tiles and not of rows. Bitwise deterministic: a CTA owns its
//          rows and takes its list in order.
#include "cuda/device/blocks.cuh"

namespace spattn {

// ---- config ----

using Row = Element<SPATTN_ROWS>;
using Score = Element<SPATTN_SCORES>;
constexpr bool kTransposed = SPATTN_TRANSPOSED;
constexpr int kChunk = SPATTN_CHUNK, kPassing = SPATTN_PASSING, kStages = SPATTN_STAGES;
constexpr int kWarps = Max(kBlock / 16, 1), kThreads = kWarps * 32;
constexpr int kEntries = kPassing / kBlock;  // of a list, in a tile
constexpr int kN = kPassing / 8, kOut = kChunk / 8;
using WTile = Tile<kTransposed ? kPassing : kBlock, kTransposed ? kBlock : kPassing>;
using XTile = Tile<kPassing, kChunk>;
constexpr int kWRows = kTransposed ? kPassing : kBlock;
constexpr int kWUnits = (kTransposed ? kBlock : kPassing) / kUnit, kXUnits = kChunk / kUnit;

struct Smem {
  static constexpr int kStage = WTile::kBytes + XTile::kBytes;
  static constexpr int kScratch = ScratchBytes<kPassing>();
  static constexpr int kBytes =
      Max(kStages * kStage + kWarps * kScratch, kWarps* StageBytes(kChunk));
};
static_assert(Smem::kBytes == SPATTN_SHARED_MEMORY, "the host counts other bytes");
static_assert(kWRows * kWUnits % kThreads == 0 && kPassing * kXUnits % kThreads == 0,
              "whole warps load");

// ---- device helpers ----

// This warp's 16 rows of the weights, as MatmulPB wants them; of a block of 8, zeros below.
DEVICE void ReadWeights(float (&w)[1][kN][4], const T* w_smem) {
  const int lane = threadIdx.x % 32, first_row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_row + i / 2 * 8, column = n * 8 + lane % 4 * 2 + i % 2;
      const T* at = w_smem + (kTransposed ? column * WTile::kRowPitch + row
                                          : row * WTile::kRowPitch + column);
      w[0][n][i] = kBlock < 16 && i >= 2 ? 0 : ToFloat(*at);
    }
  }
}

// ---- kernel ----

extern "C" __global__ void __launch_bounds__(kThreads)
    blocks_xn(const __grid_constant__ SpattnBlocksMatmul params) {
  extern __shared__ __align__(128) unsigned char smem[];
  const SpattnBlocks& g = params.blocks;
  const int64_t to_blocks = kTransposed ? g.kv_blocks : g.q_blocks;
  const int64_t from_blocks = kTransposed ? g.q_blocks : g.kv_blocks;
  const int chunks = static_cast<int>((params.head_dim + kChunk - 1) / kChunk);
  const int place = static_cast<int>(blockIdx.x / chunks);
  const int row_block = kTransposed ? place : static_cast<int>(to_blocks) - 1 - place;
  const int first_column = static_cast<int>(blockIdx.x % chunks) * kChunk;
  const int head = blockIdx.y, batch = blockIdx.z;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto from = HeadRows<const Row>::Make(kTransposed ? params.q : params.kv, params,
                                              from_blocks, batch, head);
  const List list = List::Make(params.lut, head, row_block, to_blocks, g.blocks, from_blocks);
  const auto stage_of = [&](int buffer) {
    return reinterpret_cast<T*>(smem + buffer * Smem::kStage);
  };
  // Lane i of every warp has entry i of a tile.
  const auto fetch = [&](int n) {
    return lane < kEntries ? list.Fetch(n * kEntries + lane) : Pair{-1, -1};
  };
  const auto load = [&](int buffer, const Pair& entries) {
    T *w_smem = stage_of(buffer), *x_smem = w_smem + WTile::kBytes / sizeof(T);
#pragma unroll
    for (int i = 0; i < kWRows * kWUnits / kThreads; ++i) {
      const int index = threadIdx.x + i * kThreads;
      const int r = index / kWUnits, column = index % kWUnits * kUnit;
      const int block = entries.Of((kTransposed ? r : column) / kBlock).block;
      const int at = kTransposed ? r % kBlock * kBlock + column : r * kBlock + column % kBlock;
      CopyUnit(w_smem + WTile::Offset(r, column),
               BlockAt<const Score>(params.scores, g, batch, head, Max(block, 0)) + at, block >= 0);
    }
#pragma unroll
    for (int i = 0; i < kPassing * kXUnits / kThreads; ++i) {
      const int index = threadIdx.x + i * kThreads;
      const int r = index / kXUnits, column = index % kXUnits * kUnit;
      const int other = entries.Of(r / kBlock).other;
      const bool exists = other >= 0 && first_column + column < params.head_dim;
      CopyUnit(x_smem + XTile::Offset(r, column),
               from.Row(Max(other, 0), r % kBlock) + (exists ? first_column + column : 0), exists);
    }
  };

  constexpr int kAhead = kStages - 1;
  const int tiles = CeilDiv(list.size, kEntries);
  float sum[1][kOut][4] = {};
  Pair coming = fetch(0);
  if (kAhead > 0) {
    if (tiles > 0) load(0, coming);
    CopyCommit();
    coming = fetch(1);
  }
#pragma unroll 1
  for (int n = 0; n < tiles; ++n) {
    if (n + kAhead < tiles) {
      load((n + kAhead) % kStages, coming);
      coming = fetch(n + kAhead + 1);
    }
    CopyCommit();
    CopyWait<kAhead>();
    __syncthreads();
    const T* w_smem = stage_of(n % kStages);
    const T* x_smem = w_smem + WTile::kBytes / sizeof(T);
    float* scratch =
        reinterpret_cast<float*>(smem + kStages * Smem::kStage + warp * Smem::kScratch);
    float w_frag[1][kN][4];
    ReadWeights(w_frag, w_smem);
    if constexpr (kIsFloat) {
      float tile_sum[1][kOut][4] = {};
      MatmulPB<XTile>(tile_sum, w_frag, SmemOperand::Make(x_smem), scratch);
#pragma unroll
      for (int i = 0; i < kOut * 4; ++i) sum[0][i / 4][i % 4] += tile_sum[0][i / 4][i % 4];
    } else {
      MatmulPB<XTile>(sum, w_frag, SmemOperand::Make(x_smem), scratch);
    }
    __syncthreads();  // every warp has left the buffer
  }

  // ---- epilogue ----

  const auto to =
      HeadRows<Row>::Make(kTransposed ? params.kv : params.q, params, to_blocks, batch, head);
  StoreUnits<kXUnits>(
      sum, reinterpret_cast<float*>(smem + warp * StageBytes(kChunk)),
      [&](int r, int u) -> Row* {
        const int row = warp * 16 + r, column = first_column + u * kUnit;
        return row < kBlock && column < params.head_dim ? to.Row(row_block, row) + column : nullptr;
      },
      [](int) { return 0; });
}

}  // namespace spattn
