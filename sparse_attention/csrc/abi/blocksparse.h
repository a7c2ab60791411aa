// blocksparse.h — the C ABI of the three-op family: products and softmax over tensors of blocks.
//
// Scores, weights and their gradients are [batch, heads, blocks, block_size, block_size], the computed
// blocks of each head's score matrix one after another; within a block, queries first. The laws of
// core.h hold here too.
#ifndef SPARSE_ATTENTION_ABI_BLOCKSPARSE_H_
#define SPARSE_ATTENTION_ABI_BLOCKSPARSE_H_

#include "abi/core.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
  int64_t batch;
  int32_t heads;
  int32_t block_size;           // positions: 8, 16, 32 or 64
  int64_t blocks;               // of a head; those in no table hold zeros
  int64_t q_blocks, kv_blocks;  // q_len and kv_len in blocks
} SpattnBlocks;

// A look-up table [heads, entries, 2].
//   nt: entry b is the (q block, kv block) of block b, or (-1, -1): not used. entries = blocks.
//   nn: entry i < q_blocks is the (offset, size) of q block i's list; from entry `offset` on the list
//       holds (block, kv block).
//   tn: the same for kv blocks and (block, q block).
typedef struct {
  int32_t heads;  // heads of the problem, or 1: shared between them
  int64_t entries;
  int64_t longest;  // nn, tn: no list may be longer
  const int32_t* data;
} SpattnLut;

// Contiguous elements.
typedef struct {
  void* data;
  int32_t dtype;  // SpattnDtype
} SpattnArray;

// ---- products ----
//
//   nt: scores = q kv^T      nn: q = scores kv      tn: kv = scores^T q
//
// Left of the sign is written, every element; dtypes may differ. Accumulation is float32.

typedef struct {
  SpattnBlocks blocks;
  SpattnLut lut;       // of the same name as the product
  int64_t head_dim;    // a multiple of 8
  SpattnArray scores;  // [batch, heads, blocks, block_size, block_size]
  SpattnArray q;       // [batch, q_blocks * block_size, heads * head_dim]
  SpattnArray kv;      // [batch, kv_blocks * block_size, heads * head_dim]
} SpattnBlocksMatmul;

// Bytes of 64-byte aligned workspace for that many workers, on which no result depends. Sizes are
// checked here already, the values of the table not.
SPATTN_API SpattnStatus spattn_blocks_matmul_cpu_workspace(const SpattnBlocksMatmul* params,
                                                           int32_t workers, int64_t* bytes);
SPATTN_API SpattnStatus spattn_blocks_nt_cpu(const SpattnBlocksMatmul* params,
                                             const SpattnThreads* threads, void* workspace);
SPATTN_API SpattnStatus spattn_blocks_nn_cpu(const SpattnBlocksMatmul* params,
                                             const SpattnThreads* threads, void* workspace);
SPATTN_API SpattnStatus spattn_blocks_tn_cpu(const SpattnBlocksMatmul* params,
                                             const SpattnThreads* threads, void* workspace);

// ---- softmax ----
//
//   s_ij = scale * x_ij where query i attends to key j, the lowest finite float elsewhere
//   y_ij = exp(s_ij - max_j s_ij) / sum_j exp(s_ij - max_j s_ij)      j over the keys of i's list
//   dx_ij = scale * y_ij * (dy_ij - sum_j dy_ij y_ij)
//
// So a query with a list but no key to attend to gives them all the same weight, as
// blocksparse's NumPy code does.

typedef struct {
  SpattnBlocks blocks;
  SpattnLut lut;  // nn; no block may be in two lists
  float scale;
  const void* mask;    // [mask_heads, block_size, blocks] words of block_size bits, or null: all.
  int32_t mask_heads;  // Bit j of query i's word is set where i attends to key j of the block.
  SpattnArray x;       // forward: read
  SpattnArray y;       // forward: written; gradient: read
  SpattnArray dy, dx;  // gradient: read, written
} SpattnBlocksSoftmax;

SPATTN_API SpattnStatus spattn_blocks_softmax_cpu_workspace(const SpattnBlocksSoftmax* params,
                                                            int32_t workers, int64_t* bytes);
SPATTN_API SpattnStatus spattn_blocks_softmax_cpu(const SpattnBlocksSoftmax* params,
                                                  const SpattnThreads* threads, void* workspace);
SPATTN_API SpattnStatus spattn_blocks_softmax_grad_cpu(const SpattnBlocksSoftmax* params,
                                                       const SpattnThreads* threads,
                                                       void* workspace);

// ---- partial autoregressive mask ----

// mask_out = mask without the keys j >= key that are later than the query: j > i.
typedef struct {
  SpattnBlocks blocks;
  SpattnLut lut;     // nt
  int64_t key;       // a position, in [0, kv_blocks * block_size)
  const void* mask;  // [lut.heads, block_size, blocks] words of block_size bits
  void* mask_out;    // the same, written
} SpattnBlocksMask;

SPATTN_API SpattnStatus spattn_blocks_autoregressive_mask_cpu(const SpattnBlocksMask* params,
                                                              const SpattnThreads* threads);

// ---- on CUDA ----
//
// The same structs; every pointer is in memory of the device whose context is current. What core.h
// says of its CUDA calls holds: sizes and alignment are checked; of values in a table, a pair out
// of range counts as absent, a list's size is cut to what the table holds and to `longest`. Beyond
// what the CPU asks for: q and kv have one dtype, and so have y, dy and dx.

// What a kernel is specialised for.
typedef struct {
  int32_t arch;           // compute capability: 80 is sm_80
  int32_t block_size;     // of all
  int32_t dtype;          // of q and kv
  int32_t scores_dtype;   // of a product's scores; of the softmax's x
  int32_t weights_dtype;  // of the softmax's y, dy and dx
  int32_t head_dim;
} SpattnCudaBlocksShape;

typedef enum {
  SPATTN_BLOCKS_NT = 0,
  SPATTN_BLOCKS_NN = 1,
  SPATTN_BLOCKS_TN = 2,
  SPATTN_BLOCKS_LISTED = 3,  // comes before the softmax and its gradient
  SPATTN_BLOCKS_SOFTMAX = 4,
  SPATTN_BLOCKS_MASKED_SOFTMAX = 5,
  SPATTN_BLOCKS_SOFTMAX_GRAD = 6,
  SPATTN_BLOCKS_MASK = 7,
} SpattnBlocksOp;

SPATTN_API void spattn_cuda_blocks_kernel(const SpattnCudaBlocksShape* shape, int32_t op,
                                          SpattnCudaKernel* kernel);

SPATTN_API SpattnStatus spattn_blocks_nt_cuda(const SpattnBlocksMatmul* params, void* stream);
SPATTN_API SpattnStatus spattn_blocks_nn_cuda(const SpattnBlocksMatmul* params, void* stream);
SPATTN_API SpattnStatus spattn_blocks_tn_cuda(const SpattnBlocksMatmul* params, void* stream);
SPATTN_API SpattnStatus spattn_blocks_softmax_cuda_workspace(const SpattnBlocksSoftmax* params,
                                                             int64_t* bytes);
SPATTN_API SpattnStatus spattn_blocks_softmax_cuda(const SpattnBlocksSoftmax* params, void* stream,
                                                   void* workspace);
SPATTN_API SpattnStatus spattn_blocks_softmax_grad_cuda(const SpattnBlocksSoftmax* params,
                                                        void* stream, void* workspace);
SPATTN_API SpattnStatus spattn_blocks_autoregressive_mask_cuda(const SpattnBlocksMask* params,
                                                               void* stream);

#ifdef __cplusplus
}  // extern "C"
#endif

#endif  // SPARSE_ATTENTION_ABI_BLOCKSPARSE_H_
