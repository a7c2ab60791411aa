// blocks_launch.cc — the three-op family on CUDA: chooses its kernels, checks what the host can
// see, and puts them on a stream.
#include <stdio.h>

#include <algorithm>

#include "abi/blocksparse_checks.h"
#include "abi/checks.h"
#include "cuda/device/blocks_params.h"
#include "cuda/host/modules.h"

namespace spattn {
namespace {

// ---- kernels ----

// How many columns of head_dim a CTA takes at a time.
int ChunkOf(int64_t head_dim) { return head_dim <= 16 ? 16 : head_dim <= 32 ? 32 : 64; }

// The same numbers as Tile<rows, columns>::kBytes and StageBytes(columns) of the kernels.
int TileBytes(int rows, int columns, int dtype) {
  return rows * (std::max(columns, 16) * ElementSize(dtype) + 16);
}
int StageBytes(int columns) { return 16 * (columns + 8) * 4; }

SpattnCudaKernel Begin(const char* name, int threads, int dtype, int block_size) {
  SpattnCudaKernel kernel = {"", "", 0, threads, 1};
  snprintf(kernel.name, sizeof(kernel.name), "%s", name);
  Define(&kernel, "DTYPE", dtype);
  Define(&kernel, "TF32", 0);
  Define(&kernel, "BLOCK", block_size);
  Define(&kernel, "ROW_STRIDED", 0);
  Define(&kernel, "ANEW", 0);
  Define(&kernel, "WGMMA", 0);
  return kernel;
}

SpattnCudaKernel ConfigureMatmul(const SpattnCudaBlocksShape& s, SpattnBlocksOp op) {
  const bool is_nt = op == SPATTN_BLOCKS_NT, is_tn = op == SPATTN_BLOCKS_TN;
  const int chunk = ChunkOf(s.head_dim), side = std::max(s.block_size, 16);
  // The product is in 16 bits where all operands have the same type and the device can multiply it.
  const bool has_type = s.dtype == SPATTN_FLOAT16 || (s.dtype == SPATTN_BFLOAT16 && s.arch >= 80);
  const int dtype =
      has_type && (is_nt || s.scores_dtype == s.dtype) ? s.dtype : int{SPATTN_FLOAT32};
  const int warps = is_nt ? 4 : side / 16;
  SpattnCudaKernel kernel =
      Begin(is_nt ? "blocks_nt" : "blocks_xn", warps * 32, dtype, s.block_size);
  Define(&kernel, "ROWS", s.dtype);
  Define(&kernel, "SCORES", s.scores_dtype);
  Define(&kernel, "CHUNK", chunk);
  if (is_nt) {
    const int tiles = 2 * TileBytes(64, chunk, dtype);
    kernel.shared_memory =
        warps * std::max(StageBytes(side), tiles / warps + ScratchBytes(side, dtype, s.arch));
  } else {
    // Elements that are widened on their way pass through registers, so there is one stage alone.
    const int passing = dtype == SPATTN_FLOAT32 ? std::max(s.block_size, 32) : 64;
    const int stages = dtype == SPATTN_FLOAT32 ? 1 : 2;
    const int weights =
        is_tn ? TileBytes(passing, s.block_size, dtype) : TileBytes(s.block_size, passing, dtype);
    const int stage = weights + TileBytes(passing, chunk, dtype);
    kernel.shared_memory = std::max(stages * stage + warps * ScratchBytes(passing, dtype, s.arch),
                                    warps * StageBytes(chunk));
    Define(&kernel, "PASSING", passing);
    Define(&kernel, "STAGES", stages);
    Define(&kernel, "TRANSPOSED", is_tn);
  }
  Define(&kernel, "SHARED_MEMORY", kernel.shared_memory);
  return kernel;
}

SpattnCudaKernel ConfigureBlocks(const SpattnCudaBlocksShape& s, SpattnBlocksOp op) {
  if (op <= SPATTN_BLOCKS_TN) return ConfigureMatmul(s, op);
  if (op == SPATTN_BLOCKS_LISTED) return Begin("blocks_listed", 1024, 0, s.block_size);
  if (op == SPATTN_BLOCKS_MASK) return Begin("blocks_mask", 256, 0, s.block_size);
  SpattnCudaKernel kernel = Begin("blocks_softmax", 256, 0, s.block_size);
  const bool is_gradient = op == SPATTN_BLOCKS_SOFTMAX_GRAD;
  Define(&kernel, "SCORES", is_gradient ? s.weights_dtype : s.scores_dtype);
  Define(&kernel, "WEIGHTS", s.weights_dtype);
  Define(&kernel, "MASKED", op == SPATTN_BLOCKS_MASKED_SOFTMAX);
  Define(&kernel, "GRADIENT", is_gradient);
  return kernel;
}

SpattnStatus ConfigureNumber(const SpattnCudaBlocksShape& shape, int number,
                             SpattnCudaKernel* kernel) {
  *kernel = ConfigureBlocks(shape, static_cast<SpattnBlocksOp>(number - kFirstBlocksKernel));
  return Ok();
}

// Finds the kernel of an op and launches it, on a grid that may be empty.
template <class Params>
SpattnStatus Launch(const Stream& stream, const SpattnCudaBlocksShape& shape, SpattnBlocksOp op,
                    const Params& params, int64_t x, int64_t y, int64_t z) {
  if (x == 0 || y == 0 || z == 0) return Ok();
  const LoadedKernel* kernel;
  SPATTN_RETURN_IF_ERROR(stream.Find(shape, kFirstBlocksKernel + op, ConfigureNumber, &kernel));
  return stream.Launch(*kernel, &params, x, y, z);
}

// ---- checks ----

SpattnStatus CheckGrid(int64_t x, const SpattnBlocks& g) {
  if (x > kMaxGridX || g.heads > kMaxGrid || g.batch > kMaxGrid) {
    return Failed(SPATTN_UNSUPPORTED,
                  "a GPU's grid holds %lld x %lld x %lld, got %lld for blocks=%lld, q_blocks=%lld "
                  "and kv_blocks=%lld, heads=%d, batch=%lld",
                  (LongLong)kMaxGridX, (LongLong)kMaxGrid, (LongLong)kMaxGrid, (LongLong)x,
                  (LongLong)g.blocks, (LongLong)g.q_blocks, (LongLong)g.kv_blocks, g.heads,
                  (LongLong)g.batch);
  }
  return Ok();
}

SpattnStatus CheckCudaLut(const SpattnLut& lut) {
  constexpr int64_t kMaxEntries = int64_t{1} << 30;  // a kernel steps through them with an int
  SPATTN_RETURN_IF(!IsAligned(lut.data, 8), "a table must begin at a multiple of 8 bytes, got %p",
                   static_cast<const void*>(lut.data));
  if (lut.entries > kMaxEntries) {
    return Failed(SPATTN_UNSUPPORTED, "a table may have 2^30 entries on a GPU, got %lld",
                  (LongLong)lut.entries);
  }
  return Ok();
}

struct NamedArray {
  const char* name;
  const SpattnArray& array;
};

// The kernels move elements in pieces of 16 bytes.
SpattnStatus CheckCudaArrays(std::initializer_list<NamedArray> arrays) {
  for (const auto& [name, array] : arrays) {
    SPATTN_RETURN_IF(!IsAligned(array.data, 16), "%s must begin at a multiple of 16 bytes, got %p",
                     name, array.data);
  }
  return Ok();
}

SpattnStatus CheckSameDtype(const NamedArray& a, const NamedArray& b) {
  if (a.array.dtype == b.array.dtype) return Ok();
  return Failed(SPATTN_UNSUPPORTED, "%s and %s must have the same dtype on a GPU, got %d and %d",
                a.name, b.name, a.array.dtype, b.array.dtype);
}

// ---- calls ----

SpattnStatus Matmul(const SpattnBlocksMatmul& params, SpattnBlocksOp op, void* stream) {
  const SpattnBlocks& g = params.blocks;
  SPATTN_RETURN_IF_ERROR(CheckMatmulSizes(params));
  SPATTN_RETURN_IF_ERROR(op == SPATTN_BLOCKS_NT   ? CheckPlacesSizes(params.lut, g)
                         : op == SPATTN_BLOCKS_NN ? CheckListSizes(params.lut, g, RuleOfNn(g))
                                                  : CheckListSizes(params.lut, g, RuleOfTn(g)));
  SPATTN_RETURN_IF_ERROR(CheckCudaLut(params.lut));
  SPATTN_RETURN_IF_ERROR(
      CheckCudaArrays({{"scores", params.scores}, {"q", params.q}, {"kv", params.kv}}));
  SPATTN_RETURN_IF_ERROR(CheckSameDtype({"q", params.q}, {"kv", params.kv}));
  const int64_t chunk = ChunkOf(params.head_dim), blocks_a_cta = 64 / g.block_size;
  const int64_t rows = op == SPATTN_BLOCKS_NN ? g.q_blocks : g.kv_blocks;
  const int64_t grid_x = op == SPATTN_BLOCKS_NT ? (g.blocks + blocks_a_cta - 1) / blocks_a_cta
                                                : rows * ((params.head_dim + chunk - 1) / chunk);
  SPATTN_RETURN_IF_ERROR(CheckGrid(grid_x, g));
  Stream on;
  SPATTN_RETURN_IF_ERROR(on.Open(stream));
  const SpattnCudaBlocksShape shape = {on.arch(),      g.block_size,
                                       params.q.dtype, params.scores.dtype,
                                       SPATTN_FLOAT32, static_cast<int32_t>(params.head_dim)};
  return Launch(on, shape, op, params, grid_x, g.heads, g.batch);
}

// Marks the listed blocks, then runs the softmax or its gradient.
SpattnStatus Softmax(const SpattnBlocksSoftmax& params, SpattnBlocksOp op, void* stream,
                     void* workspace) {
  const SpattnBlocks& g = params.blocks;
  SPATTN_RETURN_IF_ERROR(CheckSoftmaxSizes(params));
  SPATTN_RETURN_IF_ERROR(CheckCudaLut(params.lut));
  SPATTN_RETURN_IF_ERROR(
      CheckCudaArrays({{"x", params.x}, {"y", params.y}, {"dy", params.dy}, {"dx", params.dx}}));
  if (op == SPATTN_BLOCKS_SOFTMAX_GRAD) {
    SPATTN_RETURN_IF_ERROR(CheckSameDtype({"y", params.y}, {"dy", params.dy}));
    SPATTN_RETURN_IF_ERROR(CheckSameDtype({"y", params.y}, {"dx", params.dx}));
  }
  const int64_t grid_x = g.q_blocks * (g.block_size / 8);
  SPATTN_RETURN_IF_ERROR(CheckGrid(grid_x, g));
  if (g.blocks == 0 || g.batch == 0) return Ok();
  Stream on;
  SPATTN_RETURN_IF_ERROR(on.Open(stream));
  const SpattnCudaBlocksShape shape = {on.arch(),      g.block_size,   SPATTN_FLOAT32,
                                       params.x.dtype, params.y.dtype, 0};
  const SpattnCudaSoftmaxParams kernel_params = {params, static_cast<uint8_t*>(workspace)};
  SPATTN_RETURN_IF_ERROR(
      Launch(on, shape, SPATTN_BLOCKS_LISTED, kernel_params, params.lut.heads, 1, 1));
  return Launch(on, shape, op, kernel_params, grid_x, g.heads, g.batch);
}

SpattnStatus AutoregressiveMask(const SpattnBlocksMask& params, void* stream) {
  const SpattnBlocks& g = params.blocks;
  SPATTN_RETURN_IF_ERROR(CheckMaskSizes(params));
  SPATTN_RETURN_IF_ERROR(CheckCudaLut(params.lut));
  for (const void* mask : {params.mask, static_cast<const void*>(params.mask_out)}) {
    SPATTN_RETURN_IF(!IsAligned(mask, g.block_size / 8),
                     "a mask must begin at a multiple of %d bytes, got %p", g.block_size / 8, mask);
  }
  const int64_t grid_x = (params.lut.heads * g.block_size * g.blocks + 255) / 256;
  SPATTN_RETURN_IF_ERROR(CheckGrid(grid_x, g));
  Stream on;
  SPATTN_RETURN_IF_ERROR(on.Open(stream));
  const SpattnCudaBlocksShape shape = {on.arch(), g.block_size, 0, 0, 0, 0};
  return Launch(on, shape, SPATTN_BLOCKS_MASK, params, grid_x, 1, 1);
}

}  // namespace
}  // namespace spattn

// ---- C ABI ----

using namespace spattn;

void spattn_cuda_blocks_kernel(const SpattnCudaBlocksShape* shape, int32_t op,
                               SpattnCudaKernel* kernel) {
  *kernel = ConfigureBlocks(*shape, static_cast<SpattnBlocksOp>(op));
}

SpattnStatus spattn_blocks_nt_cuda(const SpattnBlocksMatmul* params, void* stream) {
  return Matmul(*params, SPATTN_BLOCKS_NT, stream);
}

SpattnStatus spattn_blocks_nn_cuda(const SpattnBlocksMatmul* params, void* stream) {
  return Matmul(*params, SPATTN_BLOCKS_NN, stream);
}

SpattnStatus spattn_blocks_tn_cuda(const SpattnBlocksMatmul* params, void* stream) {
  return Matmul(*params, SPATTN_BLOCKS_TN, stream);
}

SpattnStatus spattn_blocks_softmax_cuda_workspace(const SpattnBlocksSoftmax* params,
                                                  int64_t* bytes) {
  SPATTN_RETURN_IF_ERROR(CheckSoftmaxSizes(*params));
  *bytes = params->lut.heads * params->blocks.blocks;
  return Ok();
}

SpattnStatus spattn_blocks_softmax_cuda(const SpattnBlocksSoftmax* params, void* stream,
                                        void* workspace) {
  return Softmax(*params, params->mask ? SPATTN_BLOCKS_MASKED_SOFTMAX : SPATTN_BLOCKS_SOFTMAX,
                 stream, workspace);
}

SpattnStatus spattn_blocks_softmax_grad_cuda(const SpattnBlocksSoftmax* params, void* stream,
                                             void* workspace) {
  return Softmax(*params, SPATTN_BLOCKS_SOFTMAX_GRAD, stream, workspace);
}

SpattnStatus spattn_blocks_autoregressive_mask_cuda(const SpattnBlocksMask* params, void* stream) {
  return AutoregressiveMask(*params, stream);
}
