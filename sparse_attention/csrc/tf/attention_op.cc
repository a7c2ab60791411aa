// attention_op.cc — TensorFlow's BlockSparseAttention and BlockSparseAttentionGrad over the C ABI.
//
// attention_call.h checks ranks, shapes and attributes and fills the structs of core.h; the core checks
// every value in them. This file is compiled as C++14 for TF 1.15 and as C++17 for TF 2.
//
// A plan's integers come as their bytes, uint8 [..., 4]: TensorFlow keeps int32 constants of a GPU
// in host memory and would copy a plan to the device at each run.
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/attention_call.h"
#include "tf/binding.h"
#include "tf/cuda_stream.h"
#include "tf/tensor_float_32.h"

namespace spattn {
namespace {

using tensorflow::int64;
using tensorflow::OpKernel;
using tensorflow::OpKernelConstruction;
using tensorflow::OpKernelContext;
using tensorflow::Status;
using tensorflow::Tensor;
using tensorflow::TensorShape;
using tensorflow::errors::InvalidArgument;
using tensorflow::shape_inference::DimensionHandle;
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// ---- registration ----

// What both ops have: attributes, queries with keys and values, and the plan.
#define SPATTN_ATTRIBUTES               \
  Attr("T: {float, half, bfloat16}")    \
      .Attr("heads: int")               \
      .Attr("kv_heads: int")            \
      .Attr("softmax_scale: float")     \
      .Attr("row_stride: int")          \
      .Attr("block_q: int")             \
      .Attr("block_kv: int")            \
      .Attr("tile_kv: int")             \
      .Attr("logit_softcap: float = 0") \
      .Attr("dropout_rate: float = 0")  \
      .Attr("q_offset: int = 0")        \
      .Attr("plan_q_len: int = 0")      \
      .Attr("plan_kv_len: int = 0")     \
      .Attr("rule: list(string) = []")  \
      .Attr("rule_types: list({float, int32, int64, bool}) >= 0 = []")
#define SPATTN_QKV_INPUTS Input("q: T").Input("k: T").Input("v: T")
#define SPATTN_PLAN_INPUTS         \
  Input("kv_lengths: int32")       \
      .Input("kv_indptr: uint8")   \
      .Input("kv_indices: uint8")  \
      .Input("mask_ids: uint8")    \
      .Input("mask_bits: uint8")   \
      .Input("tile_blocks: uint8") \
      .Input("q_indptr: uint8")    \
      .Input("q_indices: uint8")   \
      .Input("kv_mask_ids: uint8") \
      .Input("kv_mask_bits: uint8")
#define SPATTN_RULE_INPUTS Input("rule_inputs: rule_types")

// The type of each input of the rule.
tensorflow::DataType TypeOf(int rule_input) {
  switch (rule_input) {
    case kQSegments:
    case kKvSegments:
      return tensorflow::DT_INT32;
    case kMask:
      return tensorflow::DT_BOOL;
    case kDropoutSeed:
      return tensorflow::DT_INT64;
    default:
      return tensorflow::DT_FLOAT;
  }
}

// Reads the attributes `rule` and `rule_types` of a kernel or a shape function.
template <class Context>
Status ReadRuleInputs(Context* c, int64_t* rule_inputs) {
  std::vector<std::string> names;
  tensorflow::DataTypeVector types, expected;
  SPATTN_TF_RETURN_IF_ERROR(c->GetAttr("rule", &names));
  SPATTN_TF_RETURN_IF_ERROR(c->GetAttr("rule_types", &types));
  SPATTN_TF_RETURN_IF_ERROR(ToStatus(ReadRuleNames(names, rule_inputs)));
  for (int i = 0; i < kRuleInputs; ++i) {
    if (*rule_inputs >> i & 1) expected.push_back(TypeOf(i));
  }
  if (types == expected) return Status();
  return InvalidArgument("rule_types must be ", tensorflow::DataTypeVectorString(expected),
                         " for what rule names, got ", tensorflow::DataTypeVectorString(types));
}

// The dim of a width = heads * dim; it is unknown where the width is.
Status DimOfWidth(InferenceContext* c, ShapeHandle tensor, int64 heads, DimensionHandle* dim) {
  if (heads < 1) return InvalidArgument("heads and kv_heads must be positive, got ", heads);
  return c->Divide(c->Dim(tensor, 2), heads, /*evenly_divisible=*/true, dim);
}

Status AttentionShape(InferenceContext* c) {
  ShapeHandle q, k, v;
  SPATTN_TF_RETURN_IF_ERROR(c->WithRank(c->input(kQ), 3, &q));
  SPATTN_TF_RETURN_IF_ERROR(c->WithRank(c->input(kK), 3, &k));
  SPATTN_TF_RETURN_IF_ERROR(c->WithRank(c->input(kV), 3, &v));
  int heads, kv_heads;
  SPATTN_TF_RETURN_IF_ERROR(c->GetAttr("heads", &heads));
  SPATTN_TF_RETURN_IF_ERROR(c->GetAttr("kv_heads", &kv_heads));
  DimensionHandle head_dim, head_dim_v, width, batch;
  SPATTN_TF_RETURN_IF_ERROR(DimOfWidth(c, q, heads, &head_dim));
  SPATTN_TF_RETURN_IF_ERROR(DimOfWidth(c, v, kv_heads, &head_dim_v));
  SPATTN_TF_RETURN_IF_ERROR(c->Multiply(head_dim_v, heads, &width));
  SPATTN_TF_RETURN_IF_ERROR(c->Merge(c->Dim(q, 0), c->Dim(k, 0), &batch));
  SPATTN_TF_RETURN_IF_ERROR(c->Merge(batch, c->Dim(v, 0), &batch));
  const auto o = c->MakeShape({batch, c->Dim(q, 1), width});
  SPATTN_TF_RETURN_IF_ERROR(SetOutput(c, 0, "o", o));
  return SetOutput(c, 1, "lse", c->MakeShape({batch, c->MakeDim(heads), c->Dim(q, 1)}));
}

Status AttentionGradShape(InferenceContext* c) {
  for (int i = 0; i < kQkvInputs; ++i) {
    ShapeHandle shape;
    SPATTN_TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 3, &shape));
    c->set_output(i, shape);
  }
  CallAttributes a = {};
  SPATTN_TF_RETURN_IF_ERROR(ReadRuleInputs(c, &a.rule_inputs));
  const int bias = kPlanOfGrad + kPlanInputs + a.Before(kRelativeBias);
  c->set_output(kQkvInputs, a.Has(kRelativeBias) ? c->input(bias) : c->Matrix(0, 0));
  return Status();
}

REGISTER_OP("BlockSparseAttention")
    .SPATTN_ATTRIBUTES.SPATTN_QKV_INPUTS.SPATTN_PLAN_INPUTS.SPATTN_RULE_INPUTS.Output("o: T")
    .Output("lse: float")
    .SetShapeFn(AttentionShape)
    .Doc(R"doc(
Attention over the keys that a plan lists for each tile of queries.

The plan comes in both directions, by queries and by keys: the GPU's gradient reads both, all else
the first alone, and the second may then be empty. Integers are int32 as 4 bytes.

q: [batch, q_len, heads * head_dim].
k: [batch, kv_len, kv_heads * head_dim].
v: [batch, kv_len, kv_heads * head_dim_v].
kv_lengths: [batch], or [0] for none: keys at or past it do not exist.
kv_indptr: [plan_heads * q_tiles + 1, 4], plan_heads being heads or 1.
kv_indices: [entries, 4] key blocks of each q tile.
mask_ids: [entries, 4] which block of mask_bits, or -1 for none.
mask_bits: [mask_blocks, block_kv, block_q / 8].
tile_blocks: [kv_heads or 1, kv_tiles, tile_kv / block_kv, 4] key blocks of each kv tile, or -1.
q_indptr: [plan_heads * kv_tiles + 1, 4].
q_indices: [kv_entries, 4] query blocks, of block_kv queries, of each kv tile.
kv_mask_ids: [kv_entries, 4] which block of kv_mask_bits, or -1 for none.
kv_mask_bits: [kv_mask_blocks, block_kv, tile_kv / 8].
rule_inputs: what `rule` names, some of these in their order: alibi_slopes float [heads],
  relative_bias float [heads or 1, 2 R - 1], q_segments int32 [batch, q_len], kv_segments int32
  [batch, kv_len], mask bool [batch, heads, q_len, kv_len] where each size may be 1, dropout_seed
  int64 [2].
o: [batch, q_len, heads * head_dim_v].
lse: [batch, heads, q_len] natural log of the sum of exponentials of the scaled scores.
)doc");

REGISTER_OP("BlockSparseAttentionGrad")
    .SPATTN_ATTRIBUTES.SPATTN_QKV_INPUTS.Input("o: T")
    .Input("lse: float")
    .Input("do: T")
    .Input("dlse: float")
    .SPATTN_PLAN_INPUTS.SPATTN_RULE_INPUTS.Output("dq: T")
    .Output("dk: T")
    .Output("dv: T")
    .Output("drelative_bias: float")
    .SetShapeFn(AttentionGradShape)
    .Doc("The gradient of BlockSparseAttention; drelative_bias is [0, 0] where there is none.");

// ---- attributes and inputs ----

class AttentionOp : public OpKernel {
 public:
  explicit AttentionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    struct {
      const char* name;
      int64_t* value;
    } const sizes[] = {{"heads", &attributes_.heads},
                       {"kv_heads", &attributes_.kv_heads},
                       {"row_stride", &attributes_.row_stride},
                       {"block_q", &attributes_.tile_q},
                       {"block_kv", &attributes_.block_size},
                       {"tile_kv", &attributes_.tile_kv},
                       {"q_offset", &attributes_.q_offset},
                       {"plan_q_len", &attributes_.plan_q_len},
                       {"plan_kv_len", &attributes_.plan_kv_len}};
    for (const auto& size : sizes) {
      int64 value;
      OP_REQUIRES_OK(ctx, ctx->GetAttr(size.name, &value));
      *size.value = value;
    }
    OP_REQUIRES_OK(ctx, ctx->GetAttr("softmax_scale", &attributes_.softmax_scale));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("logit_softcap", &attributes_.logit_softcap));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("dropout_rate", &attributes_.dropout_rate));
    OP_REQUIRES_OK(ctx, ReadRuleInputs(ctx, &attributes_.rule_inputs));
    OP_REQUIRES_OK(ctx, ToStatus(CheckAttributes(attributes_)));
  }

 protected:
  // Returns the attributes and sets `arrays` to the inputs.
  CallAttributes Read(OpKernelContext* ctx, Array* arrays) const {
    for (int i = 0; i < ctx->num_inputs(); ++i) arrays[i] = ArrayOf(ctx->input(i));
    CallAttributes attributes = attributes_;
    attributes.dtype = DtypeOf(ctx->input(kQ));
    attributes.allow_tf32 = AllowsTf32();
    return attributes;
  }

 private:
  CallAttributes attributes_ = {};
};

// ---- kernels ----

struct OnCpu {
  static void Run(OpKernelContext* ctx, const SpattnFwdParams& params) {
    RunOnCpu(ctx, params, spattn_fwd_cpu_workspace, spattn_fwd_cpu);
  }
  static void Run(OpKernelContext* ctx, const SpattnBwdParams& params, const CallAttributes&,
                  const Array*) {
    RunOnCpu(ctx, params, spattn_bwd_cpu_workspace, spattn_bwd_cpu);
  }
};

// TensorFlow has made the device's context current.
struct OnGpu {
  static void Run(OpKernelContext* ctx, const SpattnFwdParams& params) {
    int64_t bytes = 0;
    OP_REQUIRES_OK(ctx, ToStatus(spattn_fwd_cuda_workspace(&params, &bytes)));
    Tensor workspace;
    OP_REQUIRES_OK(ctx, ctx->allocate_temp(tensorflow::DT_UINT8, TensorShape({bytes}), &workspace));
    OP_REQUIRES_OK(ctx,
                   ToStatus(spattn_fwd_cuda(&params, CudaStream(ctx), DataOf<void>(workspace))));
  }
  static void Run(OpKernelContext* ctx, const SpattnBwdParams& params,
                  const CallAttributes& attributes, const Array* plan_inputs) {
    SpattnKvPlan by_kv = {};
    OP_REQUIRES_OK(ctx, ToStatus(ReadByKv(attributes, params.problem, plan_inputs, &by_kv)));
    int64_t bytes = 0;
    OP_REQUIRES_OK(ctx, ToStatus(spattn_bwd_cuda_workspace(&params, &by_kv, &bytes)));
    Tensor workspace;
    OP_REQUIRES_OK(ctx, ctx->allocate_temp(tensorflow::DT_UINT8, TensorShape({bytes}), &workspace));
    OP_REQUIRES_OK(
        ctx, ToStatus(spattn_bwd_cuda(&params, &by_kv, CudaStream(ctx), DataOf<void>(workspace))));
  }
};

template <class Device>
class BlockSparseAttentionOp : public AttentionOp {
 public:
  using AttentionOp::AttentionOp;

  void Compute(OpKernelContext* ctx) override {
    Array inputs[kPlanOfFwd + kPlanInputs + kRuleInputs];
    const CallAttributes attributes = Read(ctx, inputs);
    SpattnFwdParams params = {};
    OP_REQUIRES_OK(ctx, ToStatus(ReadFwd(attributes, inputs, &params)));
    const SpattnProblem& p = params.problem;
    Tensor *o = nullptr, *lse = nullptr;
    const int64 width = attributes.heads * p.head_dim_v;
    OP_REQUIRES_OK(ctx, AllocateOutput(ctx, 0, {p.batch, p.q_len, width}, &o));
    OP_REQUIRES_OK(ctx, AllocateOutput(ctx, 1, {p.batch, p.heads, p.q_len}, &lse));
    params.o = View(ArrayOf(*o), attributes.heads);
    params.lse = DataOf<float>(*lse);
    Device::Run(ctx, params);
  }
};

template <class Device>
class BlockSparseAttentionGradOp : public AttentionOp {
 public:
  using AttentionOp::AttentionOp;

  void Compute(OpKernelContext* ctx) override {
    Array inputs[kPlanOfGrad + kPlanInputs + kRuleInputs];
    const CallAttributes attributes = Read(ctx, inputs);
    SpattnBwdParams params = {};
    OP_REQUIRES_OK(ctx, ToStatus(ReadBwd(attributes, inputs, &params)));
    Tensor* gradients[kQkvInputs];
    for (int i = 0; i < kQkvInputs; ++i) {
      OP_REQUIRES_OK(ctx, ctx->allocate_output(i, ctx->input(i).shape(), &gradients[i]));
    }
    params.dq = View(ArrayOf(*gradients[kQ]), attributes.heads);
    params.dk = View(ArrayOf(*gradients[kK]), attributes.kv_heads);
    params.dv = View(ArrayOf(*gradients[kV]), attributes.kv_heads);
    const SpattnScoreRule& rule = params.rule;
    const int64_t biases = rule.relative_bias ? 2 * rule.bias_reach - 1 : 0;
    Tensor* drelative_bias;
    OP_REQUIRES_OK(ctx,
                   AllocateOutput(ctx, kQkvInputs, {rule.bias_heads, biases}, &drelative_bias));
    if (biases > 0) params.drelative_bias = DataOf<float>(*drelative_bias);
    Device::Run(ctx, params, attributes, inputs + kPlanOfGrad);
  }
};

#define SPATTN_REGISTER(DEVICE, On)                                                    \
  REGISTER_KERNEL_BUILDER(Name("BlockSparseAttention").Device(tensorflow::DEVICE),     \
                          BlockSparseAttentionOp<On>);                                 \
  REGISTER_KERNEL_BUILDER(Name("BlockSparseAttentionGrad").Device(tensorflow::DEVICE), \
                          BlockSparseAttentionGradOp<On>)
SPATTN_REGISTER(DEVICE_CPU, OnCpu);
SPATTN_REGISTER(DEVICE_GPU, OnGpu);

}  // namespace
}  // namespace spattn

// Whether float32 on a GPU runs in TF32 now.
extern "C" SPATTN_API int32_t spattn_allows_tf32() { return spattn::AllowsTf32(); }
