// configs.h — which tile shapes each CUDA kernel is compiled with.
#ifndef SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_
#define SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_

#include "abi/core.h"

namespace spattn {

// The largest tiles up to 128 that fit; a tile is at least a block.
void ChooseTiles(SpattnCudaShape* shape);

// list_keys of a shape for lists of so many keys on average: the least that has the same kernels.
int RoundListKeys(int64_t average);
constexpr int kNoMaps = -1;  // list_keys where the driver makes no tensor maps

// Whether attention_fwd_sm90 runs the forward pass of a shape: it takes SpattnCudaMappedFwdParams, and
// has parts of so many queries.
bool RunsFwdSm90(const SpattnCudaShape& shape);
int FwdSm90PartQueries(const SpattnCudaShape& shape);

SpattnCudaKernel Configure(const SpattnCudaShape& shape, SpattnPhase phase);

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_
