// attention.cc — checks every argument and every value of a plan, then calls the kernels for this CPU.
#include "abi/checks.h"
#include "abi/core.h"
#include "cpu/attention_kernels.h"
#include "cpu/isa.h"

namespace spattn {
namespace {

// ---- checks ----

SpattnStatus CheckLengths(const SpattnProblem& p) {
  for (int64_t b = 0; p.kv_lengths && b < p.batch; ++b) {
    SPATTN_RETURN_IF(p.kv_lengths[b] < 0 || p.kv_lengths[b] > p.kv_len,
                     "kv_lengths[%lld] must be in [0, kv_len=%lld], got %d", (LongLong)b,
                     (LongLong)p.kv_len, p.kv_lengths[b]);
  }
  return Ok();
}

SpattnStatus CheckPlan(const SpattnProblem& problem, const SpattnPlan& plan) {
  SPATTN_RETURN_IF_ERROR(CheckPlanSizes(problem, plan));
  const int64_t lists = plan.heads * plan.q_tiles;
  SPATTN_RETURN_IF(plan.kv_indptr[0] != 0, "kv_indptr[0] must be 0, got %d", plan.kv_indptr[0]);
  for (int64_t i = 0; i < lists; ++i) {
    const int32_t begin = plan.kv_indptr[i], end = plan.kv_indptr[i + 1];
    SPATTN_RETURN_IF(end < begin || end > plan.entries,
                     "kv_indptr[%lld] must be in [%d, %lld], got %d", (LongLong)(i + 1), begin,
                     (LongLong)plan.entries, end);
    for (int32_t e = begin; e < end; ++e) {
      const int32_t least = e == begin ? 0 : plan.kv_indices[e - 1] + 1;
      SPATTN_RETURN_IF(plan.kv_indices[e] < least || plan.kv_indices[e] >= plan.kv_blocks,
                       "kv_indices[%d] must be in [%d, %lld), got %d", e, least,
                       (LongLong)plan.kv_blocks, plan.kv_indices[e]);
      SPATTN_RETURN_IF(plan.mask_ids[e] < -1 || plan.mask_ids[e] >= plan.mask_blocks,
                       "mask_ids[%d] must be in [-1, %lld), got %d", e, (LongLong)plan.mask_blocks,
                       plan.mask_ids[e]);
    }
  }
  SPATTN_RETURN_IF(plan.kv_indptr[lists] != plan.entries,
                   "kv_indptr must end with the number of entries, %lld, got %d",
                   (LongLong)plan.entries, plan.kv_indptr[lists]);
  return Ok();
}

template <class Params>
SpattnStatus Check(const Params& params) {
  SPATTN_RETURN_IF_ERROR(CheckProblem(params.problem));
  SPATTN_RETURN_IF_ERROR(CheckLengths(params.problem));
  SPATTN_RETURN_IF_ERROR(CheckRule(params.problem, params.rule));
  return CheckPlan(params.problem, params.plan);
}

}  // namespace
}  // namespace spattn

// ---- C ABI ----

using spattn::Check;

SpattnStatus spattn_fwd_cpu_workspace(const SpattnFwdParams* params, int32_t workers,
                                      int64_t* bytes) {
  SPATTN_RETURN_IF_ERROR(Check(*params));
  *bytes = SPATTN_OF_THIS_ISA(kAttentionKernels).fwd_workspace(*params, workers);
  return spattn::Ok();
}

SpattnStatus spattn_bwd_cpu_workspace(const SpattnBwdParams* params, int32_t workers,
                                      int64_t* bytes) {
  SPATTN_RETURN_IF_ERROR(Check(*params));
  *bytes = SPATTN_OF_THIS_ISA(kAttentionKernels).bwd_workspace(*params, workers);
  return spattn::Ok();
}

SpattnStatus spattn_fwd_cpu(const SpattnFwdParams* params, const SpattnThreads* threads,
                            void* workspace) {
  SPATTN_RETURN_IF_ERROR(Check(*params));
  SPATTN_OF_THIS_ISA(kAttentionKernels).fwd(*params, *threads, workspace);
  return spattn::Ok();
}

SpattnStatus spattn_bwd_cpu(const SpattnBwdParams* params, const SpattnThreads* threads,
                            void* workspace) {
  SPATTN_RETURN_IF_ERROR(Check(*params));
  SPATTN_OF_THIS_ISA(kAttentionKernels).bwd(*params, *threads, workspace);
  return spattn::Ok();
}
