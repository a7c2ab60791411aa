// configs.h — which tile shapes each CUDA kernel is compiled with.
#ifndef SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_
#define SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_

#include "abi/core.h"

namespace spattn {

// The largest tiles up to 128 that fit; a tile is at least a block.
void ChooseTiles(SpattnCudaShape* shape);

SpattnCudaKernel Configure(const SpattnCudaShape& shape, SpattnPhase phase);

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_
