// checks.h — what must hold of a problem's and a plan's sizes, wherever their arrays lie.
//
// TensorFlow's bindings include it, so it is C++14.
#ifndef SPARSE_ATTENTION_ABI_CHECKS_H_
#define SPARSE_ATTENTION_ABI_CHECKS_H_

#include <float.h>

#include <initializer_list>

#include "abi/status.h"

namespace spattn {

constexpr int64_t kMaxLen = int64_t{1} << 31;

struct Named {
  const char* name;
  int64_t value;
};

inline bool IsBlock(int64_t size) {
  return size == 8 || size == 16 || size == 32 || size == 64 || size == 128;
}

inline int64_t Positions(int64_t len, int64_t row_stride) {
  return (len + row_stride - 1) / row_stride * row_stride;
}

// The tiles, or blocks, of so many positions that hold `len` rows.
inline int64_t CountTiles(int64_t len, int64_t row_stride, int64_t tile) {
  return (Positions(len, row_stride) + tile - 1) / tile;
}

inline SpattnStatus CheckHeadDim(const Named& dim) {
  SPATTN_RETURN_IF(dim.value < 8 || dim.value > 256 || dim.value % 8 != 0,
                   "%s must be a multiple of 8 in [8, 256], got %lld", dim.name,
                   (LongLong)dim.value);
  return Ok();
}

inline SpattnStatus CheckProblem(const SpattnProblem& p) {
  SPATTN_RETURN_IF(p.batch < 0, "batch must not be negative, got %lld", (LongLong)p.batch);
  for (const Named& len : {Named{"q_len", p.q_len}, Named{"kv_len", p.kv_len}}) {
    SPATTN_RETURN_IF(len.value < 0 || len.value >= kMaxLen, "%s must be in [0, 2^31), got %lld",
                     len.name, (LongLong)len.value);
  }
  SPATTN_RETURN_IF(p.kv_heads < 1 || p.heads < 1 || p.heads % p.kv_heads != 0,
                   "kv_heads must divide heads, got kv_heads=%d and heads=%d", p.kv_heads, p.heads);
  for (const Named& dim : {Named{"head_dim", p.head_dim}, Named{"head_dim_v", p.head_dim_v}}) {
    SPATTN_RETURN_IF_ERROR(CheckHeadDim(dim));
  }
  SPATTN_RETURN_IF(p.dtype < SPATTN_FLOAT32 || p.dtype > SPATTN_BFLOAT16,
                   "dtype must be 0, 1 or 2 (float32, float16, bfloat16), got %d", p.dtype);
  // A longer stride than that would only add positions that no row has, and work with them.
  const int64_t longest = p.q_len > p.kv_len ? p.q_len : p.kv_len;
  SPATTN_RETURN_IF(p.row_stride < 1 || (p.row_stride > longest && longest > 0),
                   "row_stride must be in [1, %lld], the longer of q_len and kv_len, got %lld",
                   (LongLong)longest, (LongLong)p.row_stride);
  return Ok();
}

inline SpattnStatus CheckRule(const SpattnProblem& problem, const SpattnScoreRule& rule) {
  SPATTN_RETURN_IF(!(rule.logit_softcap >= 0 && rule.logit_softcap <= FLT_MAX),
                   "logit_softcap must be finite and not negative, got %g", rule.logit_softcap);
  SPATTN_RETURN_IF(!(rule.dropout_rate >= 0 && rule.dropout_rate < 1),
                   "dropout_rate must be in [0, 1), got %g", rule.dropout_rate);
  SPATTN_RETURN_IF(rule.dropout_rate > 0 && rule.dropout_seed == nullptr,
                   "dropout_seed must be given with dropout_rate=%g", rule.dropout_rate);
  SPATTN_RETURN_IF(rule.q_offset <= -kMaxLen || rule.q_offset >= kMaxLen,
                   "q_offset must be in (-2^31, 2^31), got %lld", (LongLong)rule.q_offset);
  SPATTN_RETURN_IF(!rule.q_segments != !rule.kv_segments,
                   "q_segments and kv_segments must be given both, got %s alone",
                   rule.q_segments ? "q_segments" : "kv_segments");
  if (rule.relative_bias == nullptr) return Ok();
  SPATTN_RETURN_IF(rule.bias_heads != 1 && rule.bias_heads != problem.heads,
                   "relative_bias must have 1 head or heads=%d, got %lld", problem.heads,
                   (LongLong)rule.bias_heads);
  SPATTN_RETURN_IF(rule.bias_reach < 1 || rule.bias_reach >= kMaxLen,
                   "bias_reach must be in [1, 2^31), got %lld", (LongLong)rule.bias_reach);
  // Its gradient is summed for each batch element and head, up to 16 times.
  constexpr int64_t kMostSums = int64_t{1} << 50;
  SPATTN_RETURN_IF(
      problem.batch > 0 && 2 * rule.bias_reach > kMostSums / problem.heads / problem.batch,
      "relative_bias must have at most 2^50 elements for all batch elements and heads, got %lld "
      "for "
      "each of %lld and %d",
      (LongLong)(2 * rule.bias_reach - 1), (LongLong)problem.batch, problem.heads);
  return Ok();
}

inline bool IsAligned(const void* p, uintptr_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

inline SpattnStatus CheckIntArrays(std::initializer_list<const int32_t*> arrays) {
  for (const int32_t* array : arrays) {
    SPATTN_RETURN_IF(!IsAligned(array, sizeof(int32_t)),
                     "a plan's arrays must begin at multiples of 4 bytes, got %p",
                     static_cast<const void*>(array));
  }
  return Ok();
}

// A plan has as many tiles, or blocks, as the rows need; or more, where positions are rows.
inline SpattnStatus CheckCount(const SpattnProblem& problem, const Named& count, int64_t least,
                               const Named& len) {
  const bool may_be_longer = problem.row_stride == 1 && count.value < kMaxLen;
  SPATTN_RETURN_IF(count.value < least || (count.value > least && !may_be_longer),
                   "%s must be %s%lld for %s=%lld, got %lld", count.name,
                   may_be_longer ? "at least " : "", (LongLong)least, len.name, (LongLong)len.value,
                   (LongLong)count.value);
  return Ok();
}

// The values in the plan's arrays are another matter: CheckPlan in cpu/attention.cc for host memory, each
// kernel for itself in device memory.
inline SpattnStatus CheckPlanSizes(const SpattnProblem& problem, const SpattnPlan& plan) {
  SPATTN_RETURN_IF(plan.heads != 1 && plan.heads != problem.heads,
                   "the plan's heads must be 1 or heads=%d, got %d", problem.heads, plan.heads);
  for (const Named& size : {Named{"tile_q", plan.tile_q}, Named{"block_size", plan.block_size}}) {
    SPATTN_RETURN_IF(!IsBlock(size.value), "%s must be 8, 16, 32, 64 or 128, got %lld", size.name,
                     (LongLong)size.value);
  }
  const int64_t q_tiles = CountTiles(problem.q_len, problem.row_stride, plan.tile_q);
  const int64_t kv_blocks = CountTiles(problem.kv_len, problem.row_stride, plan.block_size);
  SPATTN_RETURN_IF_ERROR(
      CheckCount(problem, {"q_tiles", plan.q_tiles}, q_tiles, {"q_len", problem.q_len}));
  SPATTN_RETURN_IF_ERROR(
      CheckCount(problem, {"kv_blocks", plan.kv_blocks}, kv_blocks, {"kv_len", problem.kv_len}));
  SPATTN_RETURN_IF(plan.entries < 0 || plan.entries > INT32_MAX || plan.mask_blocks < 0,
                   "entries and mask_blocks must be in [0, 2^31), got %lld and %lld",
                   (LongLong)plan.entries, (LongLong)plan.mask_blocks);
  return CheckIntArrays({plan.kv_indptr, plan.kv_indices, plan.mask_ids});
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_ABI_CHECKS_H_
