// blocksparse_kernels.h — what each instruction set offers to blocksparse.cc.
#ifndef SPARSE_ATTENTION_CPU_BLOCKSPARSE_KERNELS_H_
#define SPARSE_ATTENTION_CPU_BLOCKSPARSE_KERNELS_H_

#include "abi/blocksparse.h"

namespace spattn {

// Arguments are checked already. `is_listed` [lut.heads, blocks] tells which blocks have a query; the
// others are filled with zeros.
struct BlocksparseKernels {
  int64_t (*matmul_workspace)(const SpattnBlocksMatmul& params, int32_t workers);
  int64_t (*softmax_workspace)(const SpattnBlocksSoftmax& params, int32_t workers);
  void (*nt)(const SpattnBlocksMatmul& params, const SpattnThreads& threads, void* workspace);
  void (*nn)(const SpattnBlocksMatmul& params, const SpattnThreads& threads, void* workspace);
  void (*tn)(const SpattnBlocksMatmul& params, const SpattnThreads& threads, void* workspace);
  void (*softmax)(const SpattnBlocksSoftmax& params, const uint8_t* is_listed,
                  const SpattnThreads& threads, void* workspace);
  void (*softmax_grad)(const SpattnBlocksSoftmax& params, const uint8_t* is_listed,
                       const SpattnThreads& threads, void* workspace);
  void (*autoregressive_mask)(const SpattnBlocksMask& params, const SpattnThreads& threads);
};

namespace baseline {
extern const BlocksparseKernels kBlocksparseKernels;
}
namespace avx2 {
extern const BlocksparseKernels kBlocksparseKernels;
}
namespace avx512 {
extern const BlocksparseKernels kBlocksparseKernels;
}
namespace avx512_bf16 {
extern const BlocksparseKernels kBlocksparseKernels;
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_BLOCKSPARSE_KERNELS_H_
