// attention_inputs.h — where the inputs of BlockSparseAttention and its gradient are.
#ifndef SPARSE_ATTENTION_TF_ATTENTION_INPUTS_H_
#define SPARSE_ATTENTION_TF_ATTENTION_INPUTS_H_

namespace spattn {

// Where the inputs are, in the order of attention_op.cc's macros. The gradient has four inputs of its own
// between the values and the plan.
enum QkvInput { kQ, kK, kV, kQkvInputs };
enum GradInput { kO = kQkvInputs, kLse, kDo, kDlse, kGradInputsEnd };
enum PlanInput {
  kKvLengths,
  kKvIndptr,
  kKvIndices,
  kMaskIds,
  kMaskBits,
  kTileBlocks,
  kQIndptr,
  kQIndices,
  kKvMaskIds,
  kKvMaskBits,
  kPlanInputs,
};
// After the plan, those that an op's attribute `rule` names, in this order.
enum RuleInput {
  kAlibiSlopes,
  kRelativeBias,
  kQSegments,
  kKvSegments,
  kMask,
  kDropoutSeed,
  kRuleInputs,
};
constexpr int kPlanOfFwd = kQkvInputs, kPlanOfGrad = kGradInputsEnd;

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_ATTENTION_INPUTS_H_
