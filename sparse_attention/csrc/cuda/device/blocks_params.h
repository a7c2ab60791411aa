// blocks_params.h — what the kernels of the three-op family are given where blocksparse.h's structs
// are not enough. By value, every pointer in device memory.
#ifndef SPARSE_ATTENTION_CUDA_DEVICE_BLOCKS_PARAMS_H_
#define SPARSE_ATTENTION_CUDA_DEVICE_BLOCKS_PARAMS_H_

#include "abi/blocksparse.h"

typedef struct {
  SpattnBlocksSoftmax call;
  uint8_t* is_listed;  // [lut.heads, blocks] whether a block is in a list: written by blocks_listed
} SpattnCudaSoftmaxParams;

#endif  // SPARSE_ATTENTION_CUDA_DEVICE_BLOCKS_PARAMS_H_
