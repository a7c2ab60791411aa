// core.cc — checks every argument and every value of a plan, then calls the kernels for this CPU.
#include "core.h"

#include <initializer_list>

#include "cpu/attention_kernels.h"
#include "isa.h"
#include "status.h"

namespace spattn {
namespace {

// ---- checks ----

struct Named {
  const char* name;
  int64_t value;
};

bool IsBlock(int64_t size) {
  return size == 8 || size == 16 || size == 32 || size == 64 || size == 128;
}

int64_t Positions(int64_t len, int64_t row_stride) {
  return (len + row_stride - 1) / row_stride * row_stride;
}

SpattnStatus CheckProblem(const SpattnProblem& p) {
  constexpr int64_t kMaxLen = int64_t{1} << 31;
  SPATTN_RETURN_IF(p.batch < 0, "batch must not be negative, got %lld", (LongLong)p.batch);
  for (const auto& [name, len] : {Named{"q_len", p.q_len}, Named{"kv_len", p.kv_len}}) {
    SPATTN_RETURN_IF(len < 0 || len >= kMaxLen, "%s must be in [0, 2^31), got %lld", name,
                     (LongLong)len);
  }
  SPATTN_RETURN_IF(p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads != 0,
                   "kv_heads must divide heads, got kv_heads=%d and heads=%d", p.kv_heads, p.heads);
  for (const auto& [name, dim] :
       {Named{"head_dim", p.head_dim}, Named{"head_dim_v", p.head_dim_v}}) {
    SPATTN_RETURN_IF(dim < 8 || dim > 256 || dim % 8 != 0,
                     "%s must be a multiple of 8 in [8, 256], got %lld", name, (LongLong)dim);
  }
  SPATTN_RETURN_IF(p.dtype < SPATTN_FLOAT32 || p.dtype > SPATTN_BFLOAT16,
                   "dtype must be 0, 1 or 2 (float32, float16, bfloat16), got %d", p.dtype);
  SPATTN_RETURN_IF(p.row_stride < 1 || p.row_stride >= kMaxLen,
                   "row_stride must be in [1, 2^31), got %lld", (LongLong)p.row_stride);
  for (int64_t b = 0; p.kv_lengths && b < p.batch; ++b) {
    SPATTN_RETURN_IF(p.kv_lengths[b] < 0 || p.kv_lengths[b] > p.kv_len,
                     "kv_lengths[%lld] must be in [0, kv_len=%lld], got %d", (LongLong)b,
                     (LongLong)p.kv_len, p.kv_lengths[b]);
  }
  return Ok();
}

SpattnStatus CheckPlan(const SpattnProblem& problem, const SpattnPlan& plan) {
  SPATTN_RETURN_IF(plan.heads != 1 && plan.heads != problem.heads,
                   "the plan's heads must be 1 or heads=%d, got %d", problem.heads, plan.heads);
  for (const auto& [name, size] :
       {Named{"block_q", plan.block_q}, Named{"block_kv", plan.block_kv}}) {
    SPATTN_RETURN_IF(!IsBlock(size), "%s must be 8, 16, 32, 64 or 128, got %lld", name,
                     (LongLong)size);
  }
  const int64_t q_tiles =
      (Positions(problem.q_len, problem.row_stride) + plan.block_q - 1) / plan.block_q;
  const int64_t kv_blocks =
      (Positions(problem.kv_len, problem.row_stride) + plan.block_kv - 1) / plan.block_kv;
  SPATTN_RETURN_IF(plan.q_tiles != q_tiles, "q_tiles must be %lld for q_len=%lld, got %lld",
                   (LongLong)q_tiles, (LongLong)problem.q_len, (LongLong)plan.q_tiles);
  SPATTN_RETURN_IF(plan.kv_blocks != kv_blocks, "kv_blocks must be %lld for kv_len=%lld, got %lld",
                   (LongLong)kv_blocks, (LongLong)problem.kv_len, (LongLong)plan.kv_blocks);
  SPATTN_RETURN_IF(plan.entries < 0 || plan.entries > INT32_MAX || plan.mask_blocks < 0,
                   "entries and mask_blocks must be in [0, 2^31), got %lld and %lld",
                   (LongLong)plan.entries, (LongLong)plan.mask_blocks);

  const int64_t lists = plan.heads * plan.q_tiles;
  SPATTN_RETURN_IF(plan.kv_indptr[0] != 0, "kv_indptr[0] must be 0, got %d", plan.kv_indptr[0]);
  for (int64_t i = 0; i < lists; ++i) {
    const int32_t begin = plan.kv_indptr[i], end = plan.kv_indptr[i + 1];
    SPATTN_RETURN_IF(end < begin || end > plan.entries,
                     "kv_indptr[%lld] must be in [%d, %lld], got %d", (LongLong)(i + 1), begin,
                     (LongLong)plan.entries, end);
    for (int32_t e = begin; e < end; ++e) {
      const int32_t least = e == begin ? 0 : plan.kv_indices[e - 1] + 1;
      SPATTN_RETURN_IF(plan.kv_indices[e] < least || plan.kv_indices[e] >= kv_blocks,
                       "kv_indices[%d] must be in [%d, %lld), got %d", e, least,
                       (LongLong)kv_blocks, plan.kv_indices[e]);
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
