// blocksparse.cc — checks every argument and every value of a look-up table, then calls the kernels
// for this CPU.
#include "blocksparse.h"

#include <string.h>

#include <initializer_list>

#include "cpu/blocksparse_kernels.h"
#include "isa.h"
#include "status.h"

namespace spattn {
namespace {

// ---- checks ----

struct Size {
  const char* name;
  int64_t value, least;
};

SpattnStatus CheckBlocks(const SpattnBlocks& g) {
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

SpattnStatus CheckArrays(std::initializer_list<SpattnArray> arrays) {
  for (const SpattnArray& array : arrays) {
    SPATTN_RETURN_IF(array.dtype < SPATTN_FLOAT32 || array.dtype > SPATTN_BFLOAT16,
                     "dtype must be 0, 1 or 2 (float32, float16, bfloat16), got %d", array.dtype);
  }
  return Ok();
}

SpattnStatus CheckLutHeads(const SpattnLut& lut, const SpattnBlocks& g) {
  SPATTN_RETURN_IF(lut.heads != 1 && lut.heads != g.heads,
                   "the table's heads must be 1 or heads=%d, got %d", g.heads, lut.heads);
  return Ok();
}

// nt: the place of every block.
SpattnStatus CheckPlaces(const SpattnLut& lut, const SpattnBlocks& g) {
  SPATTN_RETURN_IF_ERROR(CheckLutHeads(lut, g));
  SPATTN_RETURN_IF(lut.entries != g.blocks, "nt_lut must have blocks=%lld entries, got %lld",
                   (LongLong)g.blocks, (LongLong)lut.entries);
  for (int64_t i = 0; i < lut.heads * lut.entries; ++i) {
    const int32_t q = lut.data[2 * i], kv = lut.data[2 * i + 1];
    const bool is_unused = q == -1 && kv == -1;
    SPATTN_RETURN_IF(
        !is_unused && (q < 0 || q >= g.q_blocks || kv < 0 || kv >= g.kv_blocks),
        "nt_lut[%lld, %lld] must be (-1, -1) or in [0, %lld) x [0, %lld), got (%d, %d)",
        (LongLong)(i / lut.entries), (LongLong)(i % lut.entries), (LongLong)g.q_blocks,
        (LongLong)g.kv_blocks, q, kv);
  }
  return Ok();
}

// nn and tn: `lists` lists of blocks and other blocks.
struct ListsRule {
  const char* name;
  int64_t lists, others;
};

SpattnStatus CheckListSizes(const SpattnLut& lut, const SpattnBlocks& g, const ListsRule& rule) {
  SPATTN_RETURN_IF_ERROR(CheckLutHeads(lut, g));
  SPATTN_RETURN_IF(lut.entries < rule.lists, "%s must have at least %lld entries, got %lld",
                   rule.name, (LongLong)rule.lists, (LongLong)lut.entries);
  SPATTN_RETURN_IF(lut.longest < 0 || lut.longest > lut.entries,
                   "the longest list of %s must have [0, %lld] entries, got %lld", rule.name,
                   (LongLong)lut.entries, (LongLong)lut.longest);
  return Ok();
}

// Marks the blocks of the lists in `is_listed` [lut.heads, blocks], where each may be once; null: a
// block may be in several lists.
SpattnStatus CheckLists(const SpattnLut& lut, const SpattnBlocks& g, const ListsRule& rule,
                        uint8_t* is_listed) {
  SPATTN_RETURN_IF_ERROR(CheckListSizes(lut, g, rule));
  if (is_listed) memset(is_listed, 0, lut.heads * g.blocks);
  for (int64_t head = 0; head < lut.heads; ++head) {
    const int32_t* pairs = lut.data + head * lut.entries * 2;
    uint8_t* listed = is_listed ? is_listed + head * g.blocks : nullptr;
    for (int64_t i = 0; i < rule.lists; ++i) {
      const int64_t offset = pairs[2 * i], size = pairs[2 * i + 1];
      SPATTN_RETURN_IF(offset < rule.lists || size < 0 || offset + size > lut.entries,
                       "%s[%lld, %lld] must be an (offset, size) in [%lld, %lld], got (%lld, %lld)",
                       rule.name, (LongLong)head, (LongLong)i, (LongLong)rule.lists,
                       (LongLong)lut.entries, (LongLong)offset, (LongLong)size);
      SPATTN_RETURN_IF(size > lut.longest,
                       "%s[%lld, %lld] must have a size of at most %lld, got %lld", rule.name,
                       (LongLong)head, (LongLong)i, (LongLong)lut.longest, (LongLong)size);
      for (int64_t e = offset; e < offset + size; ++e) {
        const int32_t block = pairs[2 * e], other = pairs[2 * e + 1];
        SPATTN_RETURN_IF(block < 0 || block >= g.blocks || other < 0 || other >= rule.others,
                         "%s[%lld, %lld] must be in [0, %lld) x [0, %lld), got (%d, %d)", rule.name,
                         (LongLong)head, (LongLong)e, (LongLong)g.blocks, (LongLong)rule.others,
                         block, other);
        if (!listed) continue;
        SPATTN_RETURN_IF(listed[block], "%s[%lld] must list every block at most once, got %d twice",
                         rule.name, (LongLong)head, block);
        listed[block] = 1;
      }
    }
  }
  return Ok();
}

ListsRule RuleOfNn(const SpattnBlocks& g) { return {"nn_lut", g.q_blocks, g.kv_blocks}; }
ListsRule RuleOfTn(const SpattnBlocks& g) { return {"tn_lut", g.kv_blocks, g.q_blocks}; }

SpattnStatus CheckMatmulSizes(const SpattnBlocksMatmul& params) {
  constexpr int64_t kMaxHeadDim = 1 << 16;
  SPATTN_RETURN_IF_ERROR(CheckBlocks(params.blocks));
  SPATTN_RETURN_IF_ERROR(CheckArrays({params.scores, params.q, params.kv}));
  SPATTN_RETURN_IF(params.head_dim < 8 || params.head_dim > kMaxHeadDim || params.head_dim % 8 != 0,
                   "head_dim must be a multiple of 8 in [8, 65536], got %lld",
                   (LongLong)params.head_dim);
  return Ok();
}

SpattnStatus CheckSoftmaxSizes(const SpattnBlocksSoftmax& params) {
  SPATTN_RETURN_IF_ERROR(CheckBlocks(params.blocks));
  SPATTN_RETURN_IF_ERROR(CheckArrays({params.x, params.y, params.dy, params.dx}));
  SPATTN_RETURN_IF(
      params.mask && params.mask_heads != 1 && params.mask_heads != params.blocks.heads,
      "the mask's heads must be 1 or heads=%d, got %d", params.blocks.heads, params.mask_heads);
  return CheckListSizes(params.lut, params.blocks, RuleOfNn(params.blocks));
}

// ---- workspace of the softmax: is_listed, then the kernel's ----

int64_t IsListedBytes(const SpattnBlocksSoftmax& params) {
  return (params.lut.heads * params.blocks.blocks + 63) / 64 * 64;
}

// ---- calls ----

SpattnStatus RunSoftmax(const SpattnBlocksSoftmax& params, const SpattnThreads& threads,
                        void* workspace, decltype(BlocksparseKernels::softmax) kernel) {
  SPATTN_RETURN_IF_ERROR(CheckSoftmaxSizes(params));
  uint8_t* is_listed = static_cast<uint8_t*>(workspace);
  SPATTN_RETURN_IF_ERROR(CheckLists(params.lut, params.blocks, RuleOfNn(params.blocks), is_listed));
  kernel(params, is_listed, threads, is_listed + IsListedBytes(params));
  return Ok();
}

}  // namespace
}  // namespace spattn

// ---- C ABI ----

using namespace spattn;

SpattnStatus spattn_blocks_matmul_cpu_workspace(const SpattnBlocksMatmul* params, int32_t workers,
                                                int64_t* bytes) {
  SPATTN_RETURN_IF_ERROR(CheckMatmulSizes(*params));
  *bytes = SPATTN_OF_THIS_ISA(kBlocksparseKernels).matmul_workspace(*params, workers);
  return Ok();
}

SpattnStatus spattn_blocks_nt_cpu(const SpattnBlocksMatmul* params, const SpattnThreads* threads,
                                  void* workspace) {
  SPATTN_RETURN_IF_ERROR(CheckMatmulSizes(*params));
  SPATTN_RETURN_IF_ERROR(CheckPlaces(params->lut, params->blocks));
  SPATTN_OF_THIS_ISA(kBlocksparseKernels).nt(*params, *threads, workspace);
  return Ok();
}

SpattnStatus spattn_blocks_nn_cpu(const SpattnBlocksMatmul* params, const SpattnThreads* threads,
                                  void* workspace) {
  SPATTN_RETURN_IF_ERROR(CheckMatmulSizes(*params));
  SPATTN_RETURN_IF_ERROR(
      CheckLists(params->lut, params->blocks, RuleOfNn(params->blocks), nullptr));
  SPATTN_OF_THIS_ISA(kBlocksparseKernels).nn(*params, *threads, workspace);
  return Ok();
}

SpattnStatus spattn_blocks_tn_cpu(const SpattnBlocksMatmul* params, const SpattnThreads* threads,
                                  void* workspace) {
  SPATTN_RETURN_IF_ERROR(CheckMatmulSizes(*params));
  SPATTN_RETURN_IF_ERROR(
      CheckLists(params->lut, params->blocks, RuleOfTn(params->blocks), nullptr));
  SPATTN_OF_THIS_ISA(kBlocksparseKernels).tn(*params, *threads, workspace);
  return Ok();
}

SpattnStatus spattn_blocks_softmax_cpu_workspace(const SpattnBlocksSoftmax* params, int32_t workers,
                                                 int64_t* bytes) {
  SPATTN_RETURN_IF_ERROR(CheckSoftmaxSizes(*params));
  *bytes = IsListedBytes(*params) +
           SPATTN_OF_THIS_ISA(kBlocksparseKernels).softmax_workspace(*params, workers);
  return Ok();
}

SpattnStatus spattn_blocks_softmax_cpu(const SpattnBlocksSoftmax* params,
                                       const SpattnThreads* threads, void* workspace) {
  return RunSoftmax(*params, *threads, workspace, SPATTN_OF_THIS_ISA(kBlocksparseKernels).softmax);
}

SpattnStatus spattn_blocks_softmax_grad_cpu(const SpattnBlocksSoftmax* params,
                                            const SpattnThreads* threads, void* workspace) {
  return RunSoftmax(*params, *threads, workspace,
                    SPATTN_OF_THIS_ISA(kBlocksparseKernels).softmax_grad);
}

SpattnStatus spattn_blocks_autoregressive_mask_cpu(const SpattnBlocksMask* params,
                                                   const SpattnThreads* threads) {
  const SpattnBlocks& g = params->blocks;
  SPATTN_RETURN_IF_ERROR(CheckBlocks(g));
  const int64_t kv_len = g.kv_blocks * g.block_size;
  SPATTN_RETURN_IF(params->key < 0 || params->key >= kv_len,
                   "autoregress_at_key must be in [0, kv_len=%lld), got %lld", (LongLong)kv_len,
                   (LongLong)params->key);
  SPATTN_RETURN_IF_ERROR(CheckPlaces(params->lut, g));
  SPATTN_OF_THIS_ISA(kBlocksparseKernels).autoregressive_mask(*params, *threads);
  return Ok();
}
