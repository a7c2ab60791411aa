// kernels.h — what each instruction set offers. kernels.cc is compiled once for each of them.
#ifndef SPARSE_ATTENTION_CPU_KERNELS_H_
#define SPARSE_ATTENTION_CPU_KERNELS_H_

#include "../core.h"

namespace spattn {

// Arguments are checked already: see core.cc.
struct CpuKernels {
  int64_t (*fwd_workspace)(const SpattnFwdParams& params, int32_t workers);
  int64_t (*bwd_workspace)(const SpattnBwdParams& params, int32_t workers);
  void (*fwd)(const SpattnFwdParams& params, const SpattnThreads& threads, void* workspace);
  void (*bwd)(const SpattnBwdParams& params, const SpattnThreads& threads, void* workspace);
};

namespace baseline {
extern const CpuKernels kKernels;
}
namespace avx2 {
extern const CpuKernels kKernels;
}
namespace avx512 {
extern const CpuKernels kKernels;
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_KERNELS_H_
