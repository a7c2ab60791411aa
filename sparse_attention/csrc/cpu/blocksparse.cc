// blocksparse.cc — checks every argument and every value of a look-up table, then calls the kernels
// for this CPU.
#include "abi/blocksparse.h"

#include <string.h>

#include "abi/blocksparse_checks.h"
#include "cpu/blocksparse_kernels.h"
#include "cpu/isa.h"

namespace spattn {
namespace {

// ---- checks ----

// nt: the place of every block.
SpattnStatus CheckPlaces(const SpattnLut& lut, const SpattnBlocks& g) {
  SPATTN_RETURN_IF_ERROR(CheckPlacesSizes(lut, g));
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
  if (params.blocks.blocks == 0) return Ok();
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
  SPATTN_RETURN_IF_ERROR(CheckMaskSizes(*params));
  SPATTN_RETURN_IF_ERROR(CheckPlaces(params->lut, params->blocks));
  if (params->blocks.blocks == 0) return Ok();
  SPATTN_OF_THIS_ISA(kBlocksparseKernels).autoregressive_mask(*params, *threads);
  return Ok();
}
