// blocks_listed.cu — which blocks are in a list of nn_lut, for the softmax to zero the others.
//
// Math:    is_listed[head, n] = 1 if a list of that head of the table has block n, else 0
// Mapping: one CTA per head of the table: it zeroes, then its warps take a list each.
// Cost:    reads the table, writes a byte per block: thousandths of the softmax that follows.
// Numerics: exact; those who mark the same block write the same.
#include "cuda/device/blocks.cuh"

namespace spattn {

constexpr int kThreads = 1024;

extern "C" __global__ void __launch_bounds__(kThreads)
    blocks_listed(const __grid_constant__ SpattnCudaSoftmaxParams params) {
  const SpattnBlocks& g = params.call.blocks;
  const int head = blockIdx.x;
  uint8_t* listed = params.is_listed + head * g.blocks;
  for (int64_t block = threadIdx.x; block < g.blocks; block += kThreads) listed[block] = 0;
  __syncthreads();
  for (int64_t q_block = threadIdx.x / 32; q_block < g.q_blocks; q_block += kThreads / 32) {
    const List list = List::Make(params.call.lut, head, static_cast<int>(q_block), g.q_blocks,
                                 g.blocks, g.kv_blocks);
    for (int at = threadIdx.x % 32; at < list.size; at += 32) {
      const int block = list.Fetch(at).block;
      if (block >= 0) listed[block] = 1;
    }
  }
}

}  // namespace spattn
