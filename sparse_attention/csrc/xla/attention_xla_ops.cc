// attention_xla_ops.cc — lowers BlockSparseAttention and its gradient to custom calls of XLA.
//
// The checks here are for whoever compiles a graph; attention_handlers.cc makes them again.
#include <string.h>

#include <string>
#include <vector>

#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tensorflow/core/framework/kernel_def_builder.h"
#include "tf/attention_call.h"
#include "tf/tensor_float_32.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/layout_util.h"
#include "xla/shape_util.h"
#include "xla/targets.h"

namespace spattn {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::Tensor;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;

absl::Status ToStatus(const SpattnStatus& status) {
  if (status.code == SPATTN_OK) return absl::OkStatus();
  if (status.code == SPATTN_UNSUPPORTED) return absl::UnimplementedError(status.message);
  if (status.code == SPATTN_INTERNAL) return absl::InternalError(status.message);
  return absl::InvalidArgumentError(status.message);
}

class AttentionXlaOp : public XlaOpKernel {
 public:
  AttentionXlaOp(OpKernelConstruction* ctx, bool is_gradient, bool is_on_gpu)
      : XlaOpKernel(ctx), is_gradient_(is_gradient), is_on_gpu_(is_on_gpu) {
    OP_REQUIRES_OK(ctx, ctx->GetAttr("heads", &attributes_.heads));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("kv_heads", &attributes_.kv_heads));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("row_stride", &attributes_.row_stride));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("block_q", &attributes_.tile_q));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("block_kv", &attributes_.block_size));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("tile_kv", &attributes_.tile_kv));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("softmax_scale", &attributes_.softmax_scale));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("logit_softcap", &attributes_.logit_softcap));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("dropout_rate", &attributes_.dropout_rate));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("q_offset", &attributes_.q_offset));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("plan_q_len", &attributes_.plan_q_len));
    OP_REQUIRES_OK(ctx, ctx->GetAttr("plan_kv_len", &attributes_.plan_kv_len));
    std::vector<std::string> rule;  // its types have been checked by the op's kernel or shapes
    OP_REQUIRES_OK(ctx, ctx->GetAttr("rule", &rule));
    OP_REQUIRES_OK(ctx, ToStatus(ReadRuleNames(rule, &attributes_.rule_inputs)));
    tensorflow::DataType dtype;
    OP_REQUIRES_OK(ctx, ctx->GetAttr("T", &dtype));
    attributes_.dtype = dtype == tensorflow::DT_FLOAT  ? SPATTN_FLOAT32
                        : dtype == tensorflow::DT_HALF ? SPATTN_FLOAT16
                                                       : SPATTN_BFLOAT16;
  }

  void Compile(XlaOpKernelContext* ctx) override {
    CallAttributes attributes = attributes_;
    attributes.allow_tf32 = AllowsTf32();
    const int plan_input = is_gradient_ ? kPlanOfGrad : kPlanOfFwd;
    const int inputs = plan_input + kPlanInputs + attributes.CountRuleInputs();
    OP_REQUIRES(ctx, ctx->num_inputs() == inputs,
                absl::InvalidArgumentError("rule must name every input of rule_inputs"));
    std::vector<xla::Shape> shapes;
    std::vector<xla::XlaOp> operands;
    for (int i = 0; i < inputs; ++i) {
      auto shape = ctx->InputXlaShape(i);
      OP_REQUIRES_OK(ctx, shape.status());
      OP_REQUIRES(ctx, shape->is_static(),
                  absl::UnimplementedError(
                      "block_sparse_attention under XLA needs sizes that are known when the graph "
                      "is compiled, got " +
                      shape->ToString()));
      shapes.push_back(*shape);
      xla::LayoutUtil::SetToDefaultLayout(&shapes.back());  // row-major
      operands.push_back(ctx->Input(i));
    }
    std::vector<Array> arrays;
    for (const xla::Shape& shape : shapes) {
      const auto dims = shape.dimensions();
      arrays.emplace_back(nullptr, static_cast<int64_t>(dims.size()),
                          [&](int i) { return dims[i]; });
    }
    SpattnFwdParams fwd = {};
    SpattnBwdParams bwd = {};
    const SpattnProblem& problem = is_gradient_ ? bwd.problem : fwd.problem;
    OP_REQUIRES_OK(ctx, ToStatus(is_gradient_ ? ReadBwd(attributes, arrays.data(), &bwd)
                                              : ReadFwd(attributes, arrays.data(), &fwd)));
    int64_t workspace_bytes = 0;
    if (is_on_gpu_ && is_gradient_) {
      if (bwd.rule.relative_bias) bwd.drelative_bias = const_cast<float*>(bwd.rule.relative_bias);
      SpattnKvPlan by_kv = {};
      OP_REQUIRES_OK(ctx,
                     ToStatus(ReadByKv(attributes, problem, arrays.data() + kPlanOfGrad, &by_kv)));
      OP_REQUIRES_OK(ctx, ToStatus(spattn_bwd_cuda_workspace(&bwd, &by_kv, &workspace_bytes)));
    } else if (is_on_gpu_) {
      OP_REQUIRES_OK(ctx, ToStatus(spattn_fwd_cuda_workspace(&fwd, &workspace_bytes)));
    }
    if (!is_gradient_) OP_REQUIRES_OK(ctx, CheckConstantPlan(ctx, arrays));

    std::vector<xla::Shape> results;
    if (is_gradient_) {
      results = {shapes[kQ], shapes[kK], shapes[kV],
                 attributes.Has(kRelativeBias)
                     ? shapes[plan_input + kPlanInputs + attributes.Before(kRelativeBias)]
                     : xla::ShapeUtil::MakeShape(xla::F32, {0, 0})};
    } else {
      const int64_t width = attributes.heads * problem.head_dim_v;
      results = {
          xla::ShapeUtil::MakeShape(shapes[kQ].element_type(),
                                    {problem.batch, problem.q_len, width}),
          xla::ShapeUtil::MakeShape(xla::F32, {problem.batch, attributes.heads, problem.q_len})};
    }
    results.push_back(xla::ShapeUtil::MakeShape(xla::U8, {workspace_bytes}));
    const xla::XlaOp call = xla::CustomCallWithLayout(
        ctx->builder(), is_gradient_ ? kBwdTarget : kFwdTarget, operands,
        xla::ShapeUtil::MakeTupleShape(results), shapes, Opaque(attributes),
        /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
    for (int i = 0; i < (is_gradient_ ? kQkvInputs + 1 : 2); ++i) {
      ctx->SetOutput(i, xla::GetTupleElement(call, i));
    }
  }

 private:
  // Checks every value of a plan by queries that is known already. One that is not is checked, or
  // guarded, when it is read. The gradient has the plan of its forward call.
  absl::Status CheckConstantPlan(XlaOpKernelContext* ctx, std::vector<Array> arrays) const {
    std::vector<Tensor> values;  // keeps the data
    for (const int input : {kKvIndptr, kKvIndices, kMaskIds, kMaskBits}) {
      auto value = ctx->ConstantInputTensor(kPlanOfFwd + input);
      if (!value.ok()) return absl::OkStatus();
      values.push_back(*value);
      arrays[kPlanOfFwd + input].data = const_cast<char*>(values.back().tensor_data().data());
    }
    SpattnFwdParams params = {};
    SpattnStatus status = ReadFwd(attributes_, arrays.data(), &params);
    params.problem.kv_lengths = nullptr;
    int64_t bytes;
    if (status.code == SPATTN_OK) status = spattn_fwd_cpu_workspace(&params, 1, &bytes);
    return ToStatus(status);
  }

  // The attributes as MLIR writes a dictionary.
  static std::string Opaque(const CallAttributes& a) {
    const auto bits = [](float value) {
      uint32_t bits;
      memcpy(&bits, &value, sizeof(bits));
      return int64_t{bits};
    };
    std::string text;
    for (const auto& [name, value] :
         {Named{"heads", a.heads}, Named{"kv_heads", a.kv_heads}, Named{"row_stride", a.row_stride},
          Named{"tile_q", a.tile_q}, Named{"block_size", a.block_size}, Named{"tile_kv", a.tile_kv},
          Named{"scale_bits", bits(a.softmax_scale)}, Named{"dtype", a.dtype},
          Named{"allow_tf32", a.allow_tf32}, Named{"softcap_bits", bits(a.logit_softcap)},
          Named{"dropout_bits", bits(a.dropout_rate)}, Named{"q_offset", a.q_offset},
          Named{"rule_inputs", a.rule_inputs}, Named{"plan_q_len", a.plan_q_len},
          Named{"plan_kv_len", a.plan_kv_len}}) {
      text += (text.empty() ? "{" : ", ") + std::string(name) + " = " + std::to_string(value) +
              " : i64";
    }
    return text + "}";
  }

  const bool is_gradient_, is_on_gpu_;
  CallAttributes attributes_ = {};
};

// ---- registration ----

template <bool kIsGradient, bool kIsOnGpu>
struct Op : AttentionXlaOp {
  explicit Op(OpKernelConstruction* ctx) : AttentionXlaOp(ctx, kIsGradient, kIsOnGpu) {}
};

constexpr char kFwdOp[] = "BlockSparseAttention", kBwdOp[] = "BlockSparseAttentionGrad";

using FwdOnCpu = Op<false, false>;
using BwdOnCpu = Op<true, false>;
using FwdOnGpu = Op<false, true>;
using BwdOnGpu = Op<true, true>;
REGISTER_XLA_OP(Name(kFwdOp).Device(tensorflow::DEVICE_CPU_XLA_JIT), FwdOnCpu);
REGISTER_XLA_OP(Name(kBwdOp).Device(tensorflow::DEVICE_CPU_XLA_JIT), BwdOnCpu);
REGISTER_XLA_OP(Name(kFwdOp).Device(tensorflow::DEVICE_GPU_XLA_JIT), FwdOnGpu);
REGISTER_XLA_OP(Name(kBwdOp).Device(tensorflow::DEVICE_GPU_XLA_JIT), BwdOnGpu);

// TensorFlow takes what is registered above over to its op kernels once, when it first compiles a
// graph by XLA. Where that has been, we do the same for ours.
void RegisterLate(const char* op, const char* device,
                  tensorflow::OpKernel* (*make)(OpKernelConstruction*)) {
  if (!tensorflow::XlaOpRegistry::IsBackendRegistered(device)) return;
  for (const auto* kernel : tensorflow::XlaOpRegistry::DeviceKernels(device, true)) {
    if (kernel->op() == op) return;
  }
  new tensorflow::kernel_factory::OpKernelRegistrar(
      tensorflow::KernelDefBuilder(op).Device(device).Build(), op, make);  // never destroyed
}

template <class Op>
tensorflow::OpKernel* Make(OpKernelConstruction* ctx) {
  return new Op(ctx);
}

}  // namespace
}  // namespace spattn

// Called once the library is loaded.
extern "C" SPATTN_API void spattn_xla_register() {
  using namespace spattn;
  tensorflow::XlaOpRegistry::RegisterCompilationKernels();
  RegisterLate(kFwdOp, tensorflow::DEVICE_CPU_XLA_JIT, Make<FwdOnCpu>);
  RegisterLate(kBwdOp, tensorflow::DEVICE_CPU_XLA_JIT, Make<BwdOnCpu>);
  RegisterLate(kFwdOp, tensorflow::DEVICE_GPU_XLA_JIT, Make<FwdOnGpu>);
  RegisterLate(kBwdOp, tensorflow::DEVICE_GPU_XLA_JIT, Make<BwdOnGpu>);
}
