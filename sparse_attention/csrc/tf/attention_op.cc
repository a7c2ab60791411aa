// attention_op.cc — TensorFlow's BlockSparseAttention and BlockSparseAttentionGrad over the C ABI.
//
// This file checks ranks, shapes and attributes and fills the structs of core.h; the core checks
// every value in them. It is compiled as C++14 for TF 1.15 and as C++17 for TF 2.
//
// A plan's integers come as their bytes, uint8 [..., 4]: TensorFlow keeps int32 constants of a GPU
// in host memory and would copy a plan to the device at each run.
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/attention_inputs.h"
#include "tf/binding.h"
#include "tf/cuda_stream.h"

namespace spattn {
namespace {

using tensorflow::int32;
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
#define SPATTN_ATTRIBUTES            \
  Attr("T: {float, half, bfloat16}") \
      .Attr("heads: int")            \
      .Attr("kv_heads: int")         \
      .Attr("softmax_scale: float")  \
      .Attr("row_stride: int")       \
      .Attr("block_q: int")          \
      .Attr("block_kv: int")         \
      .Attr("tile_kv: int")
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
  c->set_output(0, c->MakeShape({batch, c->Dim(q, 1), width}));
  c->set_output(1, c->MakeShape({batch, c->MakeDim(heads), c->Dim(q, 1)}));
  return Status();
}

Status AttentionGradShape(InferenceContext* c) {
  for (int i = 0; i < kQkvInputs; ++i) {
    ShapeHandle shape;
    SPATTN_TF_RETURN_IF_ERROR(c->WithRank(c->input(i), 3, &shape));
    c->set_output(i, shape);
  }
  return Status();
}

REGISTER_OP("BlockSparseAttention")
    .SPATTN_ATTRIBUTES.SPATTN_QKV_INPUTS.SPATTN_PLAN_INPUTS.Output("o: T")
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
o: [batch, q_len, heads * head_dim_v].
lse: [batch, heads, q_len] natural log of the sum of exponentials of the scaled scores.
)doc");

REGISTER_OP("BlockSparseAttentionGrad")
    .SPATTN_ATTRIBUTES.SPATTN_QKV_INPUTS.Input("o: T")
    .Input("lse: float")
    .Input("do: T")
    .Input("dlse: float")
    .SPATTN_PLAN_INPUTS.Output("dq: T")
    .Output("dk: T")
    .Output("dv: T")
    .SetShapeFn(AttentionGradShape)
    .Doc("The gradient of BlockSparseAttention.");

// ---- from tensors to core.h's structs ----

// [batch, rows, heads * dim] as [batch, rows, heads, dim].
SpattnTensor View(const Tensor& tensor, int64 heads) {
  const int64 rows = tensor.dim_size(1), width = tensor.dim_size(2);
  return {DataOf<void>(tensor), rows * width, width, heads > 0 ? width / heads : 0};
}

// Reads the attributes and inputs that both ops have.
class AttentionOp : public OpKernel {
 public:
  explicit AttentionOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("heads", &heads_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("kv_heads", &kv_heads_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("softmax_scale", &softmax_scale_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("row_stride", &row_stride_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("block_q", &tile_q_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("block_kv", &block_size_));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("tile_kv", &tile_kv_));
    OP_REQUIRES(ctx, heads_ > 0 && kv_heads_ > 0 && heads_ % kv_heads_ == 0,
                InvalidArgument("kv_heads must divide heads, got kv_heads=", kv_heads_,
                                " and heads=", heads_));
    for (int32 block : {tile_q_, block_size_}) {
      OP_REQUIRES(
          ctx, block > 0 && block % 8 == 0,
          InvalidArgument("block_q and block_kv must be 8, 16, 32, 64 or 128, got ", block));
    }
    OP_REQUIRES(ctx, row_stride_ > 0,
                InvalidArgument("row_stride must be positive, got ", row_stride_));
  }

 protected:
  // Reads the sizes of q, k and v, and the plan by queries, whose inputs begin at `plan_input`.
  Status Read(OpKernelContext* ctx, int plan_input, SpattnProblem* problem, SpattnPlan* plan) {
    const Tensor &q = ctx->input(kQ), &k = ctx->input(kK), &v = ctx->input(kV);
    SPATTN_TF_RETURN_IF_ERROR(CheckWidth("q", q, "heads", heads_));
    SPATTN_TF_RETURN_IF_ERROR(CheckWidth("k", k, "kv_heads", kv_heads_));
    SPATTN_TF_RETURN_IF_ERROR(CheckWidth("v", v, "kv_heads", kv_heads_));
    const int64 batch = q.dim_size(0), kv_len = k.dim_size(1);
    const int64 head_dim = q.dim_size(2) / heads_, head_dim_v = v.dim_size(2) / kv_heads_;
    SPATTN_TF_RETURN_IF_ERROR(
        CheckShape("k", k, TensorShape({batch, kv_len, kv_heads_ * head_dim})));
    SPATTN_TF_RETURN_IF_ERROR(CheckShape("v", v, TensorShape({batch, kv_len, v.dim_size(2)})));
    const Tensor& kv_lengths = ctx->input(plan_input + kKvLengths);
    const bool has_lengths = kv_lengths.NumElements() != 0;
    SPATTN_TF_RETURN_IF_ERROR(
        CheckShape("kv_lengths", kv_lengths, TensorShape({has_lengths ? batch : int64{0}})));
    problem->batch = batch;
    problem->q_len = q.dim_size(1);
    problem->kv_len = kv_len;
    problem->heads = heads_;
    problem->kv_heads = kv_heads_;
    problem->head_dim = static_cast<int32>(head_dim);
    problem->head_dim_v = static_cast<int32>(head_dim_v);
    problem->dtype = DtypeOf(q);
    problem->softmax_scale = softmax_scale_;
    problem->row_stride = row_stride_;
    problem->kv_lengths = has_lengths ? DataOf<int32_t>(kv_lengths) : nullptr;
    return ReadPlan(ctx, plan_input, *problem, plan);
  }

  // Reads the plan by keys.
  Status ReadKvPlan(OpKernelContext* ctx, int plan_input, const SpattnProblem& problem,
                    SpattnKvPlan* plan) const {
    const Tensor& tile_blocks = ctx->input(plan_input + kTileBlocks);
    const Tensor& q_indptr = ctx->input(plan_input + kQIndptr);
    const Tensor& q_indices = ctx->input(plan_input + kQIndices);
    const Tensor& mask_ids = ctx->input(plan_input + kKvMaskIds);
    const Tensor& mask_bits = ctx->input(plan_input + kKvMaskBits);
    if (tile_kv_ < block_size_ || tile_kv_ % block_size_ != 0) {
      return InvalidArgument(
          "the gradient on a GPU needs a plan by keys with tile_kv a multiple of block_kv=",
          block_size_, ", got tile_kv=", tile_kv_,
          "; was the graph made where TensorFlow sees no GPU?");
    }
    plan->block_size = block_size_;
    plan->tile_kv = tile_kv_;
    plan->q_blocks = Blocks(problem.q_len, block_size_);
    plan->kv_tiles = tile_blocks.dims() == 4 ? tile_blocks.dim_size(1) : 0;
    const int64 lists = q_indptr.dims() == 2 ? q_indptr.dim_size(0) - 1 : 0;
    plan->heads = lists == plan->kv_tiles ? 1 : heads_;
    plan->entries = q_indices.dims() == 2 ? q_indices.dim_size(0) : 0;
    plan->mask_blocks = mask_bits.dims() == 3 ? mask_bits.dim_size(0) : 0;
    const int64 shares = plan->heads == 1 ? 1 : kv_heads_;
    SPATTN_TF_RETURN_IF_ERROR(
        CheckShape("tile_blocks", tile_blocks,
                   TensorShape({shares, plan->kv_tiles, tile_kv_ / block_size_, 4})));
    SPATTN_TF_RETURN_IF_ERROR(
        CheckShape("q_indptr", q_indptr, TensorShape({plan->heads * plan->kv_tiles + 1, 4})));
    SPATTN_TF_RETURN_IF_ERROR(CheckShape("q_indices", q_indices, TensorShape({plan->entries, 4})));
    SPATTN_TF_RETURN_IF_ERROR(CheckShape("kv_mask_ids", mask_ids, TensorShape({plan->entries, 4})));
    SPATTN_TF_RETURN_IF_ERROR(CheckShape(
        "kv_mask_bits", mask_bits, TensorShape({plan->mask_blocks, block_size_, tile_kv_ / 8})));
    plan->tile_blocks = DataOf<int32_t>(tile_blocks);
    plan->q_indptr = DataOf<int32_t>(q_indptr);
    plan->q_indices = DataOf<int32_t>(q_indices);
    plan->mask_ids = DataOf<int32_t>(mask_ids);
    plan->mask_bits = DataOf<uint8_t>(mask_bits);
    return Status();
  }

 private:
  static Status CheckWidth(const char* name, const Tensor& tensor, const char* heads_name,
                           int64 heads) {
    if (tensor.dims() != 3) {
      return InvalidArgument(name, " must have rank 3, [batch, time, ", heads_name,
                             " * dim], got shape ", tensor.shape().DebugString());
    }
    if (tensor.dim_size(2) % heads != 0) {
      return InvalidArgument("the width of ", name, " must be a multiple of ", heads_name, "=",
                             heads, ", got shape ", tensor.shape().DebugString());
    }
    return Status();
  }

  Status ReadPlan(OpKernelContext* ctx, int plan_input, const SpattnProblem& problem,
                  SpattnPlan* plan) const {
    const Tensor& kv_indptr = ctx->input(plan_input + kKvIndptr);
    const Tensor& kv_indices = ctx->input(plan_input + kKvIndices);
    const Tensor& mask_ids = ctx->input(plan_input + kMaskIds);
    const Tensor& mask_bits = ctx->input(plan_input + kMaskBits);
    plan->tile_q = tile_q_;
    plan->block_size = block_size_;
    plan->q_tiles = Blocks(problem.q_len, tile_q_);
    plan->kv_blocks = Blocks(problem.kv_len, block_size_);
    const int64 lists = kv_indptr.NumElements() / 4 - 1;
    plan->heads = lists == plan->q_tiles ? 1 : heads_;
    if (kv_indptr.shape() != TensorShape({plan->heads * plan->q_tiles + 1, 4})) {
      return InvalidArgument(
          "kv_indptr must have ", plan->q_tiles, " + 1 or heads * ", plan->q_tiles,
          " + 1 rows of 4 for q_len=", problem.q_len, " and block_q=", tile_q_, ", got shape ",
          kv_indptr.shape().DebugString(), "; was the plan made for this length?");
    }
    plan->entries = kv_indices.NumElements() / 4;
    plan->mask_blocks = mask_bits.dims() == 3 ? mask_bits.dim_size(0) : 0;
    SPATTN_TF_RETURN_IF_ERROR(
        CheckShape("kv_indices", kv_indices, TensorShape({plan->entries, 4})));
    SPATTN_TF_RETURN_IF_ERROR(CheckShape("mask_ids", mask_ids, TensorShape({plan->entries, 4})));
    SPATTN_TF_RETURN_IF_ERROR(CheckShape(
        "mask_bits", mask_bits, TensorShape({plan->mask_blocks, block_size_, tile_q_ / 8})));
    plan->kv_indptr = DataOf<int32_t>(kv_indptr);
    plan->kv_indices = DataOf<int32_t>(kv_indices);
    plan->mask_ids = DataOf<int32_t>(mask_ids);
    plan->mask_bits = DataOf<uint8_t>(mask_bits);
    return Status();
  }

  int64 Blocks(int64 len, int64 block) const {
    const int64 positions = (len + row_stride_ - 1) / row_stride_ * row_stride_;
    return (positions + block - 1) / block;
  }

  int32 heads_, kv_heads_, tile_q_, block_size_, tile_kv_;
  int64 row_stride_;
  float softmax_scale_;
};

// ---- kernels ----

struct OnCpu {
  static constexpr bool kReadsKvPlan = false;

  static void Run(OpKernelContext* ctx, const SpattnFwdParams& params) {
    RunOnCpu(ctx, params, spattn_fwd_cpu_workspace, spattn_fwd_cpu);
  }
  static void Run(OpKernelContext* ctx, const SpattnBwdParams& params, const SpattnKvPlan&) {
    RunOnCpu(ctx, params, spattn_bwd_cpu_workspace, spattn_bwd_cpu);
  }
};

// TensorFlow has made the device's context current.
struct OnGpu {
  static constexpr bool kReadsKvPlan = true;

  static void Run(OpKernelContext* ctx, const SpattnFwdParams& params) {
    OP_REQUIRES_OK(ctx, ToStatus(spattn_fwd_cuda(&params, CudaStream(ctx))));
  }
  static void Run(OpKernelContext* ctx, const SpattnBwdParams& params, const SpattnKvPlan& by_kv) {
    int64_t bytes = 0;
    OP_REQUIRES_OK(ctx, ToStatus(spattn_bwd_cuda_workspace(&params, &bytes)));
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
    SpattnFwdParams params = {};
    SpattnProblem& problem = params.problem;
    OP_REQUIRES_OK(ctx, Read(ctx, kPlanOfFwd, &problem, &params.plan));
    Tensor *o = nullptr, *lse = nullptr;
    const int64 width = static_cast<int64>(problem.heads) * problem.head_dim_v;
    OP_REQUIRES_OK(ctx,
                   ctx->allocate_output(0, TensorShape({problem.batch, problem.q_len, width}), &o));
    OP_REQUIRES_OK(ctx, ctx->allocate_output(
                            1, TensorShape({problem.batch, problem.heads, problem.q_len}), &lse));
    params.q = View(ctx->input(kQ), problem.heads);
    params.k = View(ctx->input(kK), problem.kv_heads);
    params.v = View(ctx->input(kV), problem.kv_heads);
    params.o = View(*o, problem.heads);
    params.lse = DataOf<float>(*lse);
    Device::Run(ctx, params);
  }
};

template <class Device>
class BlockSparseAttentionGradOp : public AttentionOp {
 public:
  using AttentionOp::AttentionOp;

  void Compute(OpKernelContext* ctx) override {
    SpattnBwdParams params = {};
    SpattnProblem& problem = params.problem;
    OP_REQUIRES_OK(ctx, Read(ctx, kPlanOfGrad, &problem, &params.plan));
    const int64 width = static_cast<int64>(problem.heads) * problem.head_dim_v;
    const TensorShape o_shape({problem.batch, problem.q_len, width});
    const TensorShape lse_shape({problem.batch, problem.heads, problem.q_len});
    OP_REQUIRES_OK(ctx, CheckShape("o", ctx->input(kO), o_shape));
    OP_REQUIRES_OK(ctx, CheckShape("lse", ctx->input(kLse), lse_shape));
    OP_REQUIRES_OK(ctx, CheckShape("do", ctx->input(kDo), o_shape));
    OP_REQUIRES_OK(ctx, CheckShape("dlse", ctx->input(kDlse), lse_shape));
    Tensor* gradients[kQkvInputs];
    for (int i = 0; i < kQkvInputs; ++i) {
      OP_REQUIRES_OK(ctx, ctx->allocate_output(i, ctx->input(i).shape(), &gradients[i]));
    }
    params.q = View(ctx->input(kQ), problem.heads);
    params.k = View(ctx->input(kK), problem.kv_heads);
    params.v = View(ctx->input(kV), problem.kv_heads);
    params.o = View(ctx->input(kO), problem.heads);
    params.lse = DataOf<float>(ctx->input(kLse));
    params.dout = View(ctx->input(kDo), problem.heads);
    params.dlse = DataOf<float>(ctx->input(kDlse));
    params.dq = View(*gradients[kQ], problem.heads);
    params.dk = View(*gradients[kK], problem.kv_heads);
    params.dv = View(*gradients[kV], problem.kv_heads);
    SpattnKvPlan by_kv = {};
    if (Device::kReadsKvPlan) {
      OP_REQUIRES_OK(ctx, ReadKvPlan(ctx, kPlanOfGrad, problem, &by_kv));
    }
    Device::Run(ctx, params, by_kv);
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
