// blocks_mask.cu — a mask without the keys j >= key that are later than the query.
//
// Math:    bit j of mask_out[h, i, n] = that of mask and (k < key or k <= query), k = first_key + j,
//          where nt_lut[h, n] says which query i and which first key that is
// Mapping: one thread per word; neighbours have neighbouring blocks.
// Cost:    reads and writes the mask once, and 8 bytes of table for each word: bytes are the floor.
// Numerics: exact. No value of the table leads to an address, so none is refused.
#include "cuda/device/blocks.cuh"

namespace spattn {

constexpr int kThreads = 256;

// The type of a word that has a bit for each key of a block.
using Word = Choose<kBlock <= 16, Choose<kBlock == 8, uint8_t, uint16_t>::Type,
                    Choose<kBlock == 32, uint32_t, uint64_t>::Type>::Type;

extern "C" __global__ void __launch_bounds__(kThreads)
    blocks_mask(const __grid_constant__ SpattnBlocksMask params) {
  const int64_t blocks = params.blocks.blocks;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (index >= params.lut.heads * kBlock * blocks) return;
  const int64_t block = index % blocks, i = index / blocks % kBlock;
  const int head = static_cast<int>(index / blocks / kBlock);
  const int2 place = __ldg(HeadLut(params.lut, head) + block);
  const int64_t query = place.x * static_cast<int64_t>(kBlock) + i;
  const int64_t first_key = place.y * static_cast<int64_t>(kBlock);
  int64_t kept = (params.key > query ? params.key : query + 1) - first_key;
  kept = kept < 0 ? 0 : kept > kBlock ? kBlock : kept;
  const Word keeps = kept == kBlock ? ~Word{0} : (Word{1} << kept) - 1;
  static_cast<Word*>(params.mask_out)[index] = static_cast<const Word*>(params.mask)[index] & keeps;
}

}  // namespace spattn
