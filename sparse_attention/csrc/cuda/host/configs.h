// configs.h — which tile shapes each CUDA kernel is compiled with.
#ifndef SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_
#define SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_

#include "abi/core.h"

namespace spattn {

// The largest tiles up to 128 that fit; a tile is at least a block.
void ChooseTiles(SpattnCudaShape* shape);

// Rounds the average number of keys in a list down to the least that has the same kernels: the
// list_keys of a shape.
int RoundListKeys(int64_t average);
constexpr int kNoMaps = -1;  // list_keys where the driver cannot make tensor maps

// Whether attention_fwd_sm90 runs the forward pass of a shape. It takes SpattnCudaMappedFwdParams and
// works on parts of FwdSm90PartQueries queries.
bool RunsFwdSm90(const SpattnCudaShape& shape);
int FwdSm90PartQueries(const SpattnCudaShape& shape);

// The same for the average number of queries in a list by keys, of q_len.
int RoundListQueries(int64_t average, int64_t q_len);

// Whether attention_bwd_sm90 runs the backward pass of a shape by keys. It takes
// SpattnCudaMappedBwdParams, so many queries of a plan block at a time (run_rows), and adds dq up in so
// many columns.
bool RunsBwdSm90(const SpattnCudaShape& shape);
int BwdSm90RunRows(const SpattnCudaShape& shape);
int BwdSm90DqColumns(const SpattnCudaShape& shape);
// Whether its kv tiles start with the last one of each head (SpattnCudaDqSums), so many `ctas` in all.
bool StartsWithLast(int64_t average, int64_t q_len, int64_t ctas, int multiprocessors);
// Blocks of queries for which attention_bwd_ranks needs no SpattnCudaDqSums::listed.
constexpr int kRanksSharedBlocks = 4096;

// Whether there are kernels that multiply the shape's dtype in TF32; without, uses_tf32 is nothing.
bool HasTf32(const SpattnCudaShape& shape);

SpattnCudaKernel Configure(const SpattnCudaShape& shape, SpattnPhase phase);

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CUDA_HOST_CONFIGS_H_
