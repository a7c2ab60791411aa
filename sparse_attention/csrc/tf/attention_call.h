// attention_call.h — from the inputs of BlockSparseAttention and its gradient to core.h's structs.
//
// TensorFlow's op kernels, XLA's when a graph is compiled, and XLA's handlers when it runs all read
// them here. Shapes and attributes are checked; the values in a plan are the core's affair.
#ifndef SPARSE_ATTENTION_TF_ATTENTION_CALL_H_
#define SPARSE_ATTENTION_TF_ATTENTION_CALL_H_

#include <string>
#include <vector>

#include "abi/checks.h"
#include "abi/core.h"
#include "tf/array.h"
#include "tf/attention_inputs.h"

namespace spattn {

// The attributes of the ops.
struct CallAttributes {
  int64_t heads, kv_heads, row_stride, tile_q, block_size, tile_kv;
  float softmax_scale;
  int32_t dtype;  // SpattnDtype
  bool allow_tf32;
  float logit_softcap, dropout_rate;
  int64_t q_offset;
  int64_t rule_inputs;              // bit i: the input RuleInput i is there
  int64_t plan_q_len, plan_kv_len;  // what the plan is made for; 0: as long as q, or k

  bool Has(RuleInput input) const { return rule_inputs >> input & 1; }
  // How many inputs of the rule come before one.
  int Before(int input) const {
    int count = 0;
    for (int i = 0; i < input; ++i) count += rule_inputs >> i & 1;
    return count;
  }
  int CountRuleInputs() const { return Before(kRuleInputs); }
};

// What the attribute `rule` calls the inputs, in the order of RuleInput.
inline const char* RuleInputName(int input) {
  static const char* const kNames[kRuleInputs] = {"alibi_slopes", "relative_bias", "q_segments",
                                                  "kv_segments",  "mask",          "dropout_seed"};
  return kNames[input];
}

// Reads the attribute `rule`: names of RuleInput in their order.
inline SpattnStatus ReadRuleNames(const std::vector<std::string>& names, int64_t* rule_inputs) {
  *rule_inputs = 0;
  int next = 0;
  for (const std::string& name : names) {
    while (next < kRuleInputs && name != RuleInputName(next)) ++next;
    SPATTN_RETURN_IF(
        next == kRuleInputs,
        "rule must name some of alibi_slopes, relative_bias, q_segments, kv_segments, "
        "mask and dropout_seed, each once and in this order, got %.40s where it must not "
        "be",
        name.c_str());
    *rule_inputs |= int64_t{1} << next++;
  }
  return Ok();
}

inline SpattnStatus CheckAttributes(const CallAttributes& a) {
  for (const Named& size : {Named{"heads", a.heads}, Named{"kv_heads", a.kv_heads},
                            Named{"row_stride", a.row_stride}}) {
    SPATTN_RETURN_IF(size.value < 1 || size.value >= kMaxLen, "%s must be in [1, 2^31), got %lld",
                     size.name, (LongLong)size.value);
  }
  for (const Named& len :
       {Named{"plan_q_len", a.plan_q_len}, Named{"plan_kv_len", a.plan_kv_len}}) {
    SPATTN_RETURN_IF(len.value < 0 || len.value >= kMaxLen, "%s must be in [0, 2^31), got %lld",
                     len.name, (LongLong)len.value);
  }
  SPATTN_RETURN_IF(a.heads % a.kv_heads != 0,
                   "kv_heads must divide heads, got kv_heads=%lld and heads=%lld",
                   (LongLong)a.kv_heads, (LongLong)a.heads);
  SPATTN_RETURN_IF(!IsBlock(a.tile_q) || !IsBlock(a.block_size),
                   "block_q and block_kv must be 8, 16, 32, 64 or 128, got %lld and %lld",
                   (LongLong)a.tile_q, (LongLong)a.block_size);
  return Ok();
}

// [batch, rows, heads * dim] as [batch, rows, heads, dim].
inline SpattnTensor View(const Array& array, int64_t heads) {
  const int64_t rows = array.dim(1), width = array.dim(2);
  return {array.data, rows * width, width, width / heads};
}

// Checks that an array is [batch, time, heads * dim] and gives dim.
inline SpattnStatus ReadDim(const char* name, const Array& array, const char* heads_name,
                            int64_t heads, const char* dim_name, int32_t* dim) {
  SPATTN_RETURN_IF(array.rank != 3, "%s must have rank 3, [batch, time, %s * dim], got shape %s",
                   name, heads_name, ShapeOf(array).c_str());
  SPATTN_RETURN_IF(array.dim(2) % heads != 0,
                   "the width of %s must be a multiple of %s=%lld, got shape %s", name, heads_name,
                   (LongLong)heads, ShapeOf(array).c_str());
  const int64_t width = array.dim(2) / heads;
  SPATTN_RETURN_IF_ERROR(CheckHeadDim({dim_name, width}));
  *dim = static_cast<int32_t>(width);
  return CheckElements(name, {array.dim(0), array.dim(1), array.dim(2)});
}

// Reads the sizes of q, k and v, and the plan by queries.
inline SpattnStatus ReadProblem(const CallAttributes& a, const Array* qkv, const Array* by_q,
                                SpattnProblem* problem, SpattnPlan* plan) {
  SPATTN_RETURN_IF_ERROR(CheckAttributes(a));
  const Array &q = qkv[kQ], &k = qkv[kK], &v = qkv[kV];
  SPATTN_RETURN_IF_ERROR(ReadDim("q", q, "heads", a.heads, "head_dim", &problem->head_dim));
  SPATTN_RETURN_IF_ERROR(
      ReadDim("v", v, "kv_heads", a.kv_heads, "head_dim_v", &problem->head_dim_v));
  const int64_t batch = q.dim(0), kv_len = k.dim(1);
  SPATTN_RETURN_IF_ERROR(CheckArray("k", k, {batch, kv_len, a.kv_heads * problem->head_dim}));
  SPATTN_RETURN_IF_ERROR(CheckArray("v", v, {batch, kv_len, v.dim(2)}));
  SPATTN_RETURN_IF_ERROR(CheckElements("k", {batch, kv_len, k.dim(2)}));
  SPATTN_RETURN_IF_ERROR(
      CheckElements("o", {batch, q.dim(1), a.heads * int64_t{problem->head_dim_v}}));
  const Array& kv_lengths = by_q[kKvLengths];
  const bool has_lengths = kv_lengths.rank != 1 || kv_lengths.dim(0) != 0;
  if (has_lengths) SPATTN_RETURN_IF_ERROR(CheckArray("kv_lengths", kv_lengths, {batch}));
  problem->batch = batch;
  problem->q_len = q.dim(1);
  problem->kv_len = kv_len;
  problem->heads = static_cast<int32_t>(a.heads);
  problem->kv_heads = static_cast<int32_t>(a.kv_heads);
  problem->dtype = a.dtype;
  problem->allow_tf32 = a.allow_tf32;
  problem->softmax_scale = a.softmax_scale;
  problem->row_stride = a.row_stride;
  problem->kv_lengths = has_lengths ? kv_lengths.ints() : nullptr;
  SPATTN_RETURN_IF_ERROR(CheckProblem(*problem));

  const Array &kv_indptr = by_q[kKvIndptr], &mask_bits = by_q[kMaskBits];
  plan->tile_q = static_cast<int32_t>(a.tile_q);
  plan->block_size = static_cast<int32_t>(a.block_size);
  const int64_t plan_q_len = a.plan_q_len ? a.plan_q_len : problem->q_len;
  const int64_t plan_kv_len = a.plan_kv_len ? a.plan_kv_len : kv_len;
  SPATTN_RETURN_IF(
      problem->q_len > plan_q_len || kv_len > plan_kv_len,
      "q_len and kv_len must be at most %lld and %lld, for which the plan is made, got "
      "%lld and %lld",
      (LongLong)plan_q_len, (LongLong)plan_kv_len, (LongLong)problem->q_len, (LongLong)kv_len);
  plan->q_tiles = CountTiles(plan_q_len, a.row_stride, a.tile_q);
  plan->kv_blocks = CountTiles(plan_kv_len, a.row_stride, a.block_size);
  plan->heads = kv_indptr.dim(0) - 1 == plan->q_tiles ? 1 : problem->heads;
  plan->entries = by_q[kKvIndices].dim(0);
  plan->mask_blocks = mask_bits.dim(0);
  const int64_t lists = plan->heads * plan->q_tiles;
  SPATTN_RETURN_IF(
      kv_indptr.rank != 2 || kv_indptr.dim(0) != lists + 1 || kv_indptr.dim(1) != 4,
      "kv_indptr must have shape [%lld + 1, 4] or [heads * %lld + 1, 4] for q_len=%lld and "
      "block_q=%lld, got %s; was the plan made for this length?",
      (LongLong)plan->q_tiles, (LongLong)plan->q_tiles, (LongLong)plan_q_len, (LongLong)a.tile_q,
      ShapeOf(kv_indptr).c_str());
  SPATTN_RETURN_IF_ERROR(CheckArray("kv_indices", by_q[kKvIndices], {plan->entries, 4}));
  SPATTN_RETURN_IF_ERROR(CheckArray("mask_ids", by_q[kMaskIds], {plan->entries, 4}));
  SPATTN_RETURN_IF_ERROR(
      CheckArray("mask_bits", mask_bits, {plan->mask_blocks, a.block_size, a.tile_q / 8}));
  plan->kv_indptr = kv_indptr.ints();
  plan->kv_indices = by_q[kKvIndices].ints();
  plan->mask_ids = by_q[kMaskIds].ints();
  plan->mask_bits = mask_bits.bytes();
  return Ok();
}

// Reads the rule; `inputs` are those of the rule that are there.
inline SpattnStatus ReadRule(const CallAttributes& a, const SpattnProblem& p, const Array* inputs,
                             SpattnScoreRule* rule) {
  static const int64_t kNothing[2] = {};  // of arrays without elements, and while XLA compiles
  const auto get = [&](RuleInput input) -> const Array& { return inputs[a.Before(input)]; };
  const auto data = [&](RuleInput input) -> const void* {
    return get(input).data ? get(input).data : kNothing;
  };
  const auto check = [&](RuleInput input, std::initializer_list<int64_t> dims) {
    return a.Has(input) ? CheckArray(RuleInputName(input), get(input), dims) : Ok();
  };
  rule->logit_softcap = a.logit_softcap;
  rule->dropout_rate = a.dropout_rate;
  rule->q_offset = a.q_offset;
  SPATTN_RETURN_IF_ERROR(check(kAlibiSlopes, {a.heads}));
  SPATTN_RETURN_IF_ERROR(check(kQSegments, {p.batch, p.q_len}));
  SPATTN_RETURN_IF_ERROR(check(kKvSegments, {p.batch, p.kv_len}));
  SPATTN_RETURN_IF_ERROR(check(kDropoutSeed, {2}));
  if (a.Has(kAlibiSlopes)) rule->alibi_slopes = static_cast<const float*>(data(kAlibiSlopes));
  if (a.Has(kQSegments)) rule->q_segments = static_cast<const int32_t*>(data(kQSegments));
  if (a.Has(kKvSegments)) rule->kv_segments = static_cast<const int32_t*>(data(kKvSegments));
  if (a.Has(kDropoutSeed)) rule->dropout_seed = static_cast<const int64_t*>(data(kDropoutSeed));
  if (a.Has(kRelativeBias)) {
    const Array& bias = get(kRelativeBias);
    SPATTN_RETURN_IF(bias.rank != 2 || bias.dim(1) % 2 != 1,
                     "relative_bias must have shape [heads or 1, 2 R - 1], got %s",
                     ShapeOf(bias).c_str());
    rule->relative_bias = static_cast<const float*>(data(kRelativeBias));
    rule->bias_heads = bias.dim(0);
    rule->bias_reach = (bias.dim(1) + 1) / 2;
  }
  if (a.Has(kMask)) {
    const Array& mask = get(kMask);
    const int64_t sizes[4] = {p.batch, p.heads, p.q_len, p.kv_len};
    bool fits = mask.rank == 4;
    for (int i = 0; i < 4; ++i) fits = fits && (mask.dim(i) == 1 || mask.dim(i) == sizes[i]);
    SPATTN_RETURN_IF(!fits, "mask must have shape %s, where each size may be 1, got %s",
                     ShapeOf(sizes, 4).c_str(), ShapeOf(mask).c_str());
    rule->mask = static_cast<const uint8_t*>(data(kMask));
    int64_t stride = 1;
    for (int i = 3; i >= 0; stride *= mask.dim(i--)) {
      rule->mask_strides[i] = mask.dim(i) == 1 ? 0 : stride;
    }
  }
  return CheckRule(p, *rule);
}

// Reads what the forward call reads: `inputs` are those of the op. Outputs are the caller's.
inline SpattnStatus ReadFwd(const CallAttributes& a, const Array* inputs, SpattnFwdParams* params) {
  SPATTN_RETURN_IF_ERROR(
      ReadProblem(a, inputs, inputs + kPlanOfFwd, &params->problem, &params->plan));
  SPATTN_RETURN_IF_ERROR(
      ReadRule(a, params->problem, inputs + kPlanOfFwd + kPlanInputs, &params->rule));
  params->q = View(inputs[kQ], a.heads);
  params->k = View(inputs[kK], a.kv_heads);
  params->v = View(inputs[kV], a.kv_heads);
  return Ok();
}

inline SpattnStatus ReadBwd(const CallAttributes& a, const Array* inputs, SpattnBwdParams* params) {
  const SpattnProblem& problem = params->problem;
  SPATTN_RETURN_IF_ERROR(
      ReadProblem(a, inputs, inputs + kPlanOfGrad, &params->problem, &params->plan));
  SPATTN_RETURN_IF_ERROR(ReadRule(a, problem, inputs + kPlanOfGrad + kPlanInputs, &params->rule));
  const int64_t width = a.heads * problem.head_dim_v;
  for (const int input : {kO, kDo}) {
    SPATTN_RETURN_IF_ERROR(
        CheckArray(input == kO ? "o" : "do", inputs[input], {problem.batch, problem.q_len, width}));
  }
  for (const int input : {kLse, kDlse}) {
    SPATTN_RETURN_IF_ERROR(CheckArray(input == kLse ? "lse" : "dlse", inputs[input],
                                      {problem.batch, a.heads, problem.q_len}));
  }
  params->q = View(inputs[kQ], a.heads);
  params->k = View(inputs[kK], a.kv_heads);
  params->v = View(inputs[kV], a.kv_heads);
  params->o = View(inputs[kO], a.heads);
  params->dout = View(inputs[kDo], a.heads);
  params->lse = static_cast<const float*>(inputs[kLse].data);
  params->dlse = static_cast<const float*>(inputs[kDlse].data);
  return Ok();
}

// Reads the plan by keys, which the gradient on a GPU needs; `plan_inputs` begin with kv_lengths.
inline SpattnStatus ReadByKv(const CallAttributes& a, const SpattnProblem& problem,
                             const Array* plan_inputs, SpattnKvPlan* plan) {
  const Array &tile_blocks = plan_inputs[kTileBlocks], &q_indptr = plan_inputs[kQIndptr];
  const Array& mask_bits = plan_inputs[kKvMaskBits];
  SPATTN_RETURN_IF(a.tile_kv < a.block_size || a.tile_kv > INT32_MAX || a.tile_kv % a.block_size,
                   "the gradient on a GPU needs a plan by keys with tile_kv a multiple of "
                   "block_kv=%lld, got tile_kv=%lld; was the graph made where TensorFlow sees no "
                   "GPU?",
                   (LongLong)a.block_size, (LongLong)a.tile_kv);
  plan->block_size = static_cast<int32_t>(a.block_size);
  plan->tile_kv = static_cast<int32_t>(a.tile_kv);
  plan->q_blocks = CountTiles(problem.q_len, a.row_stride, a.block_size);
  plan->kv_tiles = tile_blocks.dim(1);
  plan->heads = q_indptr.dim(0) - 1 == plan->kv_tiles ? 1 : problem.heads;
  plan->entries = plan_inputs[kQIndices].dim(0);
  plan->mask_blocks = mask_bits.dim(0);
  const int64_t shares = plan->heads == 1 ? 1 : a.kv_heads;
  SPATTN_RETURN_IF_ERROR(CheckArray("tile_blocks", tile_blocks,
                                    {shares, plan->kv_tiles, a.tile_kv / a.block_size, 4}));
  SPATTN_RETURN_IF_ERROR(CheckArray("q_indptr", q_indptr, {plan->heads * plan->kv_tiles + 1, 4}));
  SPATTN_RETURN_IF_ERROR(CheckArray("q_indices", plan_inputs[kQIndices], {plan->entries, 4}));
  SPATTN_RETURN_IF_ERROR(CheckArray("kv_mask_ids", plan_inputs[kKvMaskIds], {plan->entries, 4}));
  SPATTN_RETURN_IF_ERROR(
      CheckArray("kv_mask_bits", mask_bits, {plan->mask_blocks, a.block_size, a.tile_kv / 8}));
  plan->tile_blocks = tile_blocks.ints();
  plan->q_indptr = q_indptr.ints();
  plan->q_indices = plan_inputs[kQIndices].ints();
  plan->mask_ids = plan_inputs[kKvMaskIds].ints();
  plan->mask_bits = mask_bits.bytes();
  return Ok();
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_ATTENTION_CALL_H_
