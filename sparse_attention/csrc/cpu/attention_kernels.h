// attention_kernels.h — what each instruction set offers to cpu/attention.cc.
#ifndef SPARSE_ATTENTION_CPU_ATTENTION_KERNELS_H_
#define SPARSE_ATTENTION_CPU_ATTENTION_KERNELS_H_

#include "abi/core.h"

namespace spattn {

// Arguments are checked already.
struct AttentionKernels {
  int64_t (*fwd_workspace)(const SpattnFwdParams& params, int32_t workers);
  int64_t (*bwd_workspace)(const SpattnBwdParams& params, int32_t workers);
  void (*fwd)(const SpattnFwdParams& params, const SpattnThreads& threads, void* workspace);
  void (*bwd)(const SpattnBwdParams& params, const SpattnThreads& threads, void* workspace);
};

namespace baseline {
extern const AttentionKernels kAttentionKernels;
}
namespace avx2 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512 {
extern const AttentionKernels kAttentionKernels;
}
namespace avx512_bf16 {
extern const AttentionKernels kAttentionKernels;
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_ATTENTION_KERNELS_H_
