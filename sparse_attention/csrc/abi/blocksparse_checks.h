// blocksparse_checks.h — what must hold of the three-op family's sizes, wherever the arrays lie.
#ifndef SPARSE_ATTENTION_ABI_BLOCKSPARSE_CHECKS_H_
#define SPARSE_ATTENTION_ABI_BLOCKSPARSE_CHECKS_H_

#include <initializer_list>

#include "abi/blocksparse.h"
#include "abi/status.h"

namespace spattn {

struct Size {
  const char* name;
  int64_t value, least;
};

inline SpattnStatus CheckBlocks(const SpattnBlocks& g) {
  constexpr int64_t kEnd = int64_t{1} << 31;
  SPATTN_RETURN_IF(
      g.block_size != 8 && g.block_size != 16 && g.block_size != 32 && g.block_size != 64,
      "block_size must be 8, 16, 32 or 64, got %d", g.block_size);
  SPATTN_RETURN_IF(g.batch < 0, "batch must not be negative, got %lld", (LongLong)g.batch);
  for (const Size& size : {Size{"heads", g.heads, 1}, Size{"blocks", g.blocks, 0},
                           Size{"q_blocks", g.q_blocks, 1}, Size{"kv_blocks", g.kv_blocks, 1}}) {
    SPATTN_RETURN_IF(size.value < size.least || size.value >= kEnd,
                     "%s must be in [%lld, 2^31), got %lld", size.name, (LongLong)size.least,
                     (LongLong)size.value);
  }
  return Ok();
}

inline SpattnStatus CheckArrays(std::initializer_list<SpattnArray> arrays) {
  for (const SpattnArray& array : arrays) {
    SPATTN_RETURN_IF(array.dtype < SPATTN_FLOAT32 || array.dtype > SPATTN_BFLOAT16,
                     "dtype must be 0, 1 or 2 (float32, float16, bfloat16), got %d", array.dtype);
  }
  return Ok();
}

inline SpattnStatus CheckLutHeads(const SpattnLut& lut, const SpattnBlocks& g) {
  SPATTN_RETURN_IF(lut.heads != 1 && lut.heads != g.heads,
                   "the table's heads must be 1 or heads=%d, got %d", g.heads, lut.heads);
  return Ok();
}

inline SpattnStatus CheckPlacesSizes(const SpattnLut& lut, const SpattnBlocks& g) {
  SPATTN_RETURN_IF_ERROR(CheckLutHeads(lut, g));
  SPATTN_RETURN_IF(lut.entries != g.blocks, "nt_lut must have blocks=%lld entries, got %lld",
                   (LongLong)g.blocks, (LongLong)lut.entries);
  return Ok();
}

// nn and tn: `lists` lists of blocks and other blocks.
struct ListsRule {
  const char* name;
  int64_t lists, others;
};

inline SpattnStatus CheckListSizes(const SpattnLut& lut, const SpattnBlocks& g,
                                   const ListsRule& rule) {
  SPATTN_RETURN_IF_ERROR(CheckLutHeads(lut, g));
  SPATTN_RETURN_IF(lut.entries < rule.lists, "%s must have at least %lld entries, got %lld",
                   rule.name, (LongLong)rule.lists, (LongLong)lut.entries);
  SPATTN_RETURN_IF(lut.longest < 0 || lut.longest > lut.entries,
                   "the longest list of %s must have [0, %lld] entries, got %lld", rule.name,
                   (LongLong)lut.entries, (LongLong)lut.longest);
  return Ok();
}

inline ListsRule RuleOfNn(const SpattnBlocks& g) { return {"nn_lut", g.q_blocks, g.kv_blocks}; }
inline ListsRule RuleOfTn(const SpattnBlocks& g) { return {"tn_lut", g.kv_blocks, g.q_blocks}; }

inline SpattnStatus CheckMatmulSizes(const SpattnBlocksMatmul& params) {
  constexpr int64_t kMaxHeadDim = 1 << 16;
  SPATTN_RETURN_IF_ERROR(CheckBlocks(params.blocks));
  SPATTN_RETURN_IF_ERROR(CheckArrays({params.scores, params.q, params.kv}));
  SPATTN_RETURN_IF(params.head_dim < 8 || params.head_dim > kMaxHeadDim || params.head_dim % 8 != 0,
                   "head_dim must be a multiple of 8 in [8, 65536], got %lld",
                   (LongLong)params.head_dim);
  return Ok();
}

inline SpattnStatus CheckSoftmaxSizes(const SpattnBlocksSoftmax& params) {
  const SpattnBlocks& g = params.blocks;
  SPATTN_RETURN_IF_ERROR(CheckBlocks(g));
  // No tensor bounds the number of q blocks, whose lists may all be empty.
  constexpr int64_t kMostLists = int64_t{1} << 31;
  SPATTN_RETURN_IF(g.blocks > 0 && g.batch > kMostLists / (g.heads * g.q_blocks),
                   "batch * heads * q_blocks must be at most 2^31, got %lld * %d * %lld",
                   (LongLong)g.batch, g.heads, (LongLong)g.q_blocks);
  SPATTN_RETURN_IF_ERROR(CheckArrays({params.x, params.y, params.dy, params.dx}));
  SPATTN_RETURN_IF(params.mask && params.mask_heads != 1 && params.mask_heads != g.heads,
                   "the mask's heads must be 1 or heads=%d, got %d", g.heads, params.mask_heads);
  return CheckListSizes(params.lut, g, RuleOfNn(g));
}

inline SpattnStatus CheckMaskSizes(const SpattnBlocksMask& params) {
  const SpattnBlocks& g = params.blocks;
  SPATTN_RETURN_IF_ERROR(CheckBlocks(g));
  const int64_t kv_len = g.kv_blocks * g.block_size;
  SPATTN_RETURN_IF(params.key < 0 || params.key >= kv_len,
                   "autoregress_at_key must be in [0, kv_len=%lld), got %lld", (LongLong)kv_len,
                   (LongLong)params.key);
  return CheckPlacesSizes(params.lut, g);
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_ABI_BLOCKSPARSE_CHECKS_H_
