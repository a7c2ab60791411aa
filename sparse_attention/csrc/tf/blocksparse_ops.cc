// blocksparse_ops.cc — blocksparse's TensorFlow ops over the C ABI of blocksparse.h.
//
// Names, inputs and attributes are blocksparse's, so that graphs saved with it run here. Ours beyond
// those: bfloat16 a and b, float scores and weights, and the attribute XT.
//
// This file checks ranks, shapes and attributes and fills the structs of blocksparse.h; the core
// checks every value in them (on a GPU: the kernels do). It is compiled as C++14 for TF 1.15 and as
// C++17 for TF 2.
#include "abi/blocksparse.h"
#include "tensorflow/core/framework/op.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/binding.h"
#include "tf/cuda_stream.h"

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
using tensorflow::shape_inference::InferenceContext;
using tensorflow::shape_inference::ShapeHandle;

// ---- registration ----

// Where the inputs are. A table is an input for each product: its own, and those of the gradients.
enum MatmulInput { kA, kB, kLuts };
enum SoftmaxInput { kX, kScale, kLut, kMask };
enum SoftmaxGradInput { kDy, kY, kGradScale, kGradLut };
enum AutoregressiveMaskInput { kMaskIn, kPlaces, kKey };

// Attributes that are sizes, each below this: a product of a few of them stays in an int64.
constexpr int64 kMostOfASize = (int64{1} << 31) - 1;

template <class Context>  // InferenceContext or OpKernelConstruction
Status GetSize(Context* c, const char* name, int64* size) {
  SPATTN_TF_RETURN_IF_ERROR(c->GetAttr(name, size));
  if (*size >= 0 && *size <= kMostOfASize) return Status();
  return InvalidArgument(name, " must be in [0, 2^31), got ", *size);
}

template <class Context>
Status GetBlockSize(Context* c, int64* size) {
  SPATTN_TF_RETURN_IF_ERROR(c->GetAttr("blk_size", size));
  if (*size == 8 || *size == 16 || *size == 32 || *size == 64) return Status();
  return InvalidArgument("blk_size must be 8, 16, 32 or 64, got ", *size);
}

Status NtShape(InferenceContext* c) {
  ShapeHandle a;
  SPATTN_TF_RETURN_IF_ERROR(c->WithRank(c->input(kA), 3, &a));
  int64 heads, blocks, block_size;
  SPATTN_TF_RETURN_IF_ERROR(GetSize(c, "heads", &heads));
  SPATTN_TF_RETURN_IF_ERROR(GetSize(c, "blocks", &blocks));
  SPATTN_TF_RETURN_IF_ERROR(GetBlockSize(c, &block_size));
  const auto scores = c->MakeShape({c->Dim(a, 0), heads, blocks, block_size, block_size});
  return SetOutput(c, 0, "c", scores);
}

Status XnShape(InferenceContext* c) {
  ShapeHandle b;
  SPATTN_TF_RETURN_IF_ERROR(c->WithRank(c->input(kB), 3, &b));
  int64 row_blocks, block_size;
  SPATTN_TF_RETURN_IF_ERROR(GetSize(c, "ctx_blks_c", &row_blocks));
  SPATTN_TF_RETURN_IF_ERROR(GetBlockSize(c, &block_size));
  const auto rows = c->MakeShape({c->Dim(b, 0), row_blocks * block_size, c->Dim(b, 2)});
  return SetOutput(c, 0, "c", rows);
}

Status FirstInputShape(InferenceContext* c) {
  c->set_output(0, c->input(0));
  return Status();
}

REGISTER_OP("BlocksparseTransformerNT")
    .Input("a: T")
    .Input("b: T")
    .Input("nt_lut: int32")
    .Input("nn_lut: int32")
    .Input("tn_lut: int32")
    .Output("c: CT")
    .Attr("T: {half, float, bfloat16}")
    .Attr("CT: {half, bfloat16, float}")
    .Attr("heads: int >= 1")
    .Attr("blocks: int >= 0")
    .Attr("blk_size: int >= 8")
    .Attr("ctx_blks_a: int >= 1")
    .Attr("ctx_blks_b: int >= 1")
    .Attr("ctx_blks_c: int = 0")
    .Attr("nn_max: int >= 0")
    .Attr("tn_max: int >= 0")
    .Attr("bench: int = 0")
    .SetShapeFn(NtShape)
    .Doc(R"doc(
The blocks of a b^T that nt_lut lists.

a: [batch, ctx_blks_a * blk_size, heads * head_dim].
b: [batch, ctx_blks_b * blk_size, heads * head_dim].
nt_lut: [heads or 1, blocks, 2] (q block, kv block), or (-1, -1) for a block of zeros.
nn_lut: for the gradient.
tn_lut: for the gradient.
c: [batch, heads, blocks, blk_size, blk_size].
)doc");

REGISTER_OP("BlocksparseTransformerNN")
    .Input("a: AT")
    .Input("b: T")
    .Input("nt_lut: int32")
    .Input("nn_lut: int32")
    .Input("tn_lut: int32")
    .Output("c: T")
    .Attr("T: {half, float, bfloat16}")
    .Attr("AT: {half, bfloat16, float}")
    .Attr("heads: int >= 1")
    .Attr("blocks: int >= 0")
    .Attr("blk_size: int >= 8")
    .Attr("ctx_blks_a: int = 0")
    .Attr("ctx_blks_b: int >= 1")
    .Attr("ctx_blks_c: int >= 1")
    .Attr("nn_max: int >= 0")
    .Attr("tn_max: int >= 0")
    .Attr("bench: int = 0")
    .SetShapeFn(XnShape)
    .Doc(R"doc(
a b, with the blocks a that nn_lut lists for each q block.

a: [batch, heads, blocks, blk_size, blk_size].
b: [batch, ctx_blks_b * blk_size, heads * head_dim].
nt_lut: for the gradient.
nn_lut: [heads or 1, ctx_blks_c + blocks, 2] an (offset, size) for each q block, then its (block,
  kv block)s from that offset on.
tn_lut: for the gradient.
c: [batch, ctx_blks_c * blk_size, heads * head_dim].
)doc");

REGISTER_OP("BlocksparseTransformerTN")
    .Input("a: AT")
    .Input("b: T")
    .Input("nt_lut: int32")
    .Input("nn_lut: int32")
    .Input("tn_lut: int32")
    .Output("c: T")
    .Attr("T: {half, float, bfloat16}")
    .Attr("AT: {half, bfloat16, float}")
    .Attr("heads: int >= 1")
    .Attr("blocks: int >= 0")
    .Attr("blk_size: int >= 8")
    .Attr("ctx_blks_a: int = 0")
    .Attr("ctx_blks_b: int >= 1")
    .Attr("ctx_blks_c: int >= 1")
    .Attr("nn_max: int >= 0")
    .Attr("tn_max: int >= 0")
    .Attr("bench: int = 0")
    .SetShapeFn(XnShape)
    .Doc(R"doc(
a^T b, with the blocks a that tn_lut lists for each kv block.

a: [batch, heads, blocks, blk_size, blk_size].
b: [batch, ctx_blks_b * blk_size, heads * head_dim].
nt_lut: for the gradient.
nn_lut: for the gradient.
tn_lut: [heads or 1, ctx_blks_c + blocks, 2] an (offset, size) for each kv block, then its (block,
  q block)s from that offset on.
c: [batch, ctx_blks_c * blk_size, heads * head_dim].
)doc");

REGISTER_OP("BlocksparseMaskedSoftmax")
    .Input("x: XT")
    .Input("scale: float")
    .Input("lut: int32")
    .Input("mask: MT")
    .Output("y: T")
    .Attr("T: {half, bfloat16, float}")
    .Attr("MT: {uint8, uint16, uint32, uint64}")
    .Attr("blocks: int >= 0")
    .Attr("blk_size: int >= 8")
    .Attr("ctx_blks: int >= 1")
    .Attr("lut_max: int >= 0")
    .Attr("XT: {bfloat16, float} = DT_BFLOAT16")
    .SetShapeFn(FirstInputShape)
    .Doc(R"doc(
Softmax of scale * x over the keys in the lists of lut that mask allows to each query.

x: [batch, heads, blocks, blk_size, blk_size].
lut: nn_lut, [heads or 1, ctx_blks + blocks, 2].
mask: [heads or 1, blk_size, blocks] words of blk_size bits; bit k of a query's word is key k.
)doc");

REGISTER_OP("BlocksparseSoftmax")
    .Input("x: XT")
    .Input("scale: float")
    .Input("lut: int32")
    .Output("y: T")
    .Attr("T: {half, bfloat16, float}")
    .Attr("blocks: int >= 0")
    .Attr("blk_size: int >= 8")
    .Attr("ctx_blks: int >= 1")
    .Attr("lut_max: int >= 0")
    .Attr("XT: {bfloat16, float} = DT_BFLOAT16")
    .SetShapeFn(FirstInputShape)
    .Doc("Softmax of scale * x over the keys in the lists of lut.");

REGISTER_OP("BlocksparseSoftmaxGrad")
    .Input("dy: T")
    .Input("y: T")
    .Input("scale: float")
    .Input("lut: int32")
    .Output("dx: T")
    .Attr("T: {half, bfloat16, float}")
    .Attr("blocks: int >= 0")
    .Attr("blk_size: int >= 8")
    .Attr("ctx_blks: int >= 1")
    .Attr("lut_max: int >= 0")
    .SetShapeFn(FirstInputShape)
    .Doc("scale * y * (dy - sum(dy * y)), the gradient of BlocksparseSoftmax, masked or not.");

REGISTER_OP("BstPartialAutoregressiveMask")
    .Input("mask: MT")
    .Input("lut: int32")
    .Input("autoregress_at_k: KT")
    .Output("mask_out: MT")
    .Attr("MT: {uint8, uint16, uint32, uint64}")
    .Attr("KT: {int32, int64}")
    .Attr("blocks: int >= 0")
    .Attr("blk_size: int >= 8")
    .Attr("ctx_blks_k: int >= 1")
    .SetShapeFn(FirstInputShape)
    .Doc(R"doc(
The mask without the keys at or past autoregress_at_k that are later than the query.

mask: [lut heads, blk_size, blocks], as for BlocksparseMaskedSoftmax.
lut: nt_lut, [lut heads, blocks, 2].
)doc");

// ---- what the kernels share ----

class BlocksOp : public OpKernel {
 public:
  explicit BlocksOp(OpKernelConstruction* ctx) : OpKernel(ctx) {
    OP_REQUIRES_OK(ctx, GetSize(ctx, "blocks", &blocks_));
    OP_REQUIRES_OK(ctx, GetBlockSize(ctx, &block_size_));
  }

 protected:
  Status ReadLut(const char* name, const Tensor& tensor, int64 heads, int64 longest,
                 SpattnLut* lut) const {
    if (tensor.dims() != 3 || tensor.dim_size(2) != 2 ||
        (tensor.dim_size(0) != 1 && tensor.dim_size(0) != heads)) {
      return InvalidArgument(name, " must have shape [1 or ", heads, ", entries, 2], got ",
                             tensor.shape().DebugString());
    }
    *lut = {static_cast<int32_t>(tensor.dim_size(0)), tensor.dim_size(1), longest,
            DataOf<int32_t>(tensor)};
    return Status();
  }

  static Status CheckHeads(const char* name, int64 heads) {
    if (heads >= 1 && heads <= kMostOfASize) return Status();
    return InvalidArgument(name, " must have heads in [1, 2^31), got ", heads);
  }

  Status CheckMask(const Tensor& mask) const {
    if (mask.dims() != 3 || mask.dim_size(1) != block_size_ || mask.dim_size(2) != blocks_) {
      return InvalidArgument("mask must have shape [heads, ", block_size_, ", ", blocks_, "], got ",
                             mask.shape().DebugString());
    }
    if (tensorflow::DataTypeSize(mask.dtype()) * 8 != block_size_) {
      return InvalidArgument("mask must be uint", block_size_, " for blk_size=", block_size_,
                             ", got ", tensorflow::DataTypeString(mask.dtype()));
    }
    return Status();
  }

  static SpattnArray ElementsOf(const Tensor& tensor) {
    return {DataOf<void>(tensor), DtypeOf(tensor)};
  }

  int64 blocks_, block_size_;
};

// ---- devices ----

enum Product { kNt, kNn, kTn };

struct OnCpu {
  static void Run(OpKernelContext* ctx, const SpattnBlocksMatmul& params, Product product) {
    constexpr decltype(&spattn_blocks_nt_cpu) kCalls[] = {
        spattn_blocks_nt_cpu, spattn_blocks_nn_cpu, spattn_blocks_tn_cpu};
    RunOnCpu(ctx, params, spattn_blocks_matmul_cpu_workspace, kCalls[product]);
  }
  static void Run(OpKernelContext* ctx, const SpattnBlocksSoftmax& params) {
    RunOnCpu(ctx, params, spattn_blocks_softmax_cpu_workspace, spattn_blocks_softmax_cpu);
  }
  static void RunGrad(OpKernelContext* ctx, const SpattnBlocksSoftmax& params) {
    RunOnCpu(ctx, params, spattn_blocks_softmax_cpu_workspace, spattn_blocks_softmax_grad_cpu);
  }
  static void Run(OpKernelContext* ctx, SpattnBlocksMask params) {
    Tensor integers;
    OP_REQUIRES_OK(ctx, OwnIntegers(ctx, &params, &integers));
    const SpattnThreads threads = WorkerPool(ctx);
    OP_REQUIRES_OK(ctx, ToStatus(spattn_blocks_autoregressive_mask_cpu(&params, &threads)));
  }
};

// TensorFlow has made the device's context current.
struct OnGpu {
  static void Run(OpKernelContext* ctx, const SpattnBlocksMatmul& params, Product product) {
    constexpr decltype(&spattn_blocks_nt_cuda) kCalls[] = {
        spattn_blocks_nt_cuda, spattn_blocks_nn_cuda, spattn_blocks_tn_cuda};
    OP_REQUIRES_OK(ctx, ToStatus(kCalls[product](&params, CudaStream(ctx))));
  }
  static void Run(OpKernelContext* ctx, const SpattnBlocksSoftmax& params) {
    RunSoftmax(ctx, params, spattn_blocks_softmax_cuda);
  }
  static void RunGrad(OpKernelContext* ctx, const SpattnBlocksSoftmax& params) {
    RunSoftmax(ctx, params, spattn_blocks_softmax_grad_cuda);
  }
  static void Run(OpKernelContext* ctx, const SpattnBlocksMask& params) {
    OP_REQUIRES_OK(ctx, ToStatus(spattn_blocks_autoregressive_mask_cuda(&params, CudaStream(ctx))));
  }

 private:
  static void RunSoftmax(OpKernelContext* ctx, const SpattnBlocksSoftmax& params,
                         decltype(&spattn_blocks_softmax_cuda) call) {
    int64_t bytes = 0;
    OP_REQUIRES_OK(ctx, ToStatus(spattn_blocks_softmax_cuda_workspace(&params, &bytes)));
    Tensor workspace;
    OP_REQUIRES_OK(ctx, ctx->allocate_temp(tensorflow::DT_UINT8, TensorShape({bytes}), &workspace));
    OP_REQUIRES_OK(ctx, ToStatus(call(&params, CudaStream(ctx), DataOf<void>(workspace))));
  }
};

// ---- products ----

template <class Device, Product kProduct>
class MatmulOp : public BlocksOp {
 public:
  explicit MatmulOp(OpKernelConstruction* ctx) : BlocksOp(ctx) {
    const char* const q_blocks[] = {"ctx_blks_a", "ctx_blks_c", "ctx_blks_b"};
    const char* const kv_blocks[] = {"ctx_blks_b", "ctx_blks_b", "ctx_blks_c"};
    OP_REQUIRES_OK(ctx, GetSize(ctx, "heads", &heads_));
    OP_REQUIRES_OK(ctx, GetSize(ctx, q_blocks[kProduct], &q_blocks_));
    OP_REQUIRES_OK(ctx, GetSize(ctx, kv_blocks[kProduct], &kv_blocks_));
    OP_REQUIRES_OK(ctx, GetSize(ctx, kProduct == kTn ? "tn_max" : "nn_max", &longest_));
  }

  void Compute(OpKernelContext* ctx) override {
    const char* const luts[] = {"nt_lut", "nn_lut", "tn_lut"};
    SpattnBlocksMatmul params = {};
    const Tensor &a = ctx->input(kA), &b = ctx->input(kB);
    OP_REQUIRES(
        ctx,
        b.dims() == 3 && b.dim_size(2) % heads_ == 0 && b.dim_size(2) / heads_ % 8 == 0 &&
            b.dim_size(2) > 0,
        InvalidArgument("b must have shape [batch, length, heads * head_dim] with heads=", heads_,
                        " and head_dim a multiple of 8, got ", b.shape().DebugString()));
    const int64 batch = b.dim_size(0), width = b.dim_size(2);
    const std::initializer_list<int64_t> q_shape = {batch, q_blocks_ * block_size_, width};
    const std::initializer_list<int64_t> kv_shape = {batch, kv_blocks_ * block_size_, width};
    const std::initializer_list<int64_t> scores_shape = {batch, heads_, blocks_, block_size_,
                                                         block_size_};
    const auto& c_shape = kProduct == kNt ? scores_shape : kProduct == kNn ? q_shape : kv_shape;
    OP_REQUIRES_OK(ctx,
                   ToStatus(CheckArray("a", ArrayOf(a), kProduct == kNt ? q_shape : scores_shape)));
    OP_REQUIRES_OK(ctx,
                   ToStatus(CheckArray("b", ArrayOf(b), kProduct == kTn ? q_shape : kv_shape)));
    OP_REQUIRES_OK(ctx, ToStatus(CheckElements("c", c_shape)));
    OP_REQUIRES_OK(
        ctx, ReadLut(luts[kProduct], ctx->input(kLuts + kProduct), heads_, longest_, &params.lut));
    params.blocks = {batch,
                     static_cast<int32_t>(heads_),
                     static_cast<int32_t>(block_size_),
                     blocks_,
                     q_blocks_,
                     kv_blocks_};
    params.head_dim = width / heads_;

    Tensor* c = nullptr;
    OP_REQUIRES_OK(ctx, AllocateOutput(ctx, 0, c_shape, &c));
    params.scores = ElementsOf(kProduct == kNt ? *c : a);
    params.q = ElementsOf(kProduct == kNt ? a : kProduct == kNn ? *c : b);
    params.kv = ElementsOf(kProduct == kTn ? *c : b);
    Device::Run(ctx, params, kProduct);
  }

 private:
  int64 heads_, q_blocks_, kv_blocks_, longest_;
};

// ---- softmax ----

class SoftmaxOp : public BlocksOp {
 public:
  explicit SoftmaxOp(OpKernelConstruction* ctx) : BlocksOp(ctx) {
    OP_REQUIRES_OK(ctx, GetSize(ctx, "ctx_blks", &q_blocks_));
    OP_REQUIRES_OK(ctx, GetSize(ctx, "lut_max", &longest_));
  }

 protected:
  // Reads the sizes of a tensor of blocks, the scale and the table, which are inputs with these
  // numbers.
  Status Read(OpKernelContext* ctx, const char* name, int x_input, int scale_input, int lut_input,
              SpattnBlocksSoftmax* params) {
    constexpr int64 kAnyKvBlocks = kMostOfASize;  // no attribute tells, no memory depends on it
    const Tensor &x = ctx->input(x_input), &scale = ctx->input(scale_input);
    if (x.dims() != 5) {
      return InvalidArgument(name,
                             " must have rank 5, [batch, heads, blocks, blk_size, blk_size], got ",
                             x.shape().DebugString());
    }
    const int64 heads = x.dim_size(1);
    SPATTN_TF_RETURN_IF_ERROR(CheckHeads(name, heads));
    SPATTN_TF_RETURN_IF_ERROR(ToStatus(
        CheckArray(name, ArrayOf(x), {x.dim_size(0), heads, blocks_, block_size_, block_size_})));
    SPATTN_TF_RETURN_IF_ERROR(
        ToStatus(CheckElements(name, {x.dim_size(0), heads, blocks_, block_size_, block_size_})));
    SPATTN_TF_RETURN_IF_ERROR(ToStatus(CheckArray("scale", ArrayOf(scale), {})));
    SPATTN_TF_RETURN_IF_ERROR(ReadLut("lut", ctx->input(lut_input), heads, longest_, &params->lut));
    params->blocks = {x.dim_size(0),
                      static_cast<int32_t>(heads),
                      static_cast<int32_t>(block_size_),
                      blocks_,
                      q_blocks_,
                      kAnyKvBlocks};
    params->scale = *DataOf<float>(scale);
    return Status();
  }

 private:
  int64 q_blocks_, longest_;
};

template <class Device>
class SoftmaxFwdOp : public SoftmaxOp {
 public:
  using SoftmaxOp::SoftmaxOp;

  void Compute(OpKernelContext* ctx) override {
    SpattnBlocksSoftmax params = {};
    OP_REQUIRES_OK(ctx, Read(ctx, "x", kX, kScale, kLut, &params));
    if (ctx->num_inputs() > 3) {
      const Tensor& mask = ctx->input(kMask);
      OP_REQUIRES_OK(ctx, CheckMask(mask));
      OP_REQUIRES(ctx, mask.dim_size(0) == 1 || mask.dim_size(0) == params.blocks.heads,
                  InvalidArgument("the mask's heads must be 1 or ", params.blocks.heads, ", got ",
                                  mask.dim_size(0)));
      params.mask = DataOf<void>(mask);
      params.mask_heads = static_cast<int32_t>(mask.dim_size(0));
    }
    Tensor* y = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, ctx->input(kX).shape(), &y));
    params.x = ElementsOf(ctx->input(kX));
    params.y = ElementsOf(*y);
    Device::Run(ctx, params);
  }
};

template <class Device>
class SoftmaxGradOp : public SoftmaxOp {
 public:
  using SoftmaxOp::SoftmaxOp;

  void Compute(OpKernelContext* ctx) override {
    SpattnBlocksSoftmax params = {};
    OP_REQUIRES_OK(ctx, Read(ctx, "dy", kDy, kGradScale, kGradLut, &params));
    OP_REQUIRES(ctx, ctx->input(kY).shape() == ctx->input(kDy).shape(),
                InvalidArgument("y must have shape ", ShapeOf(ArrayOf(ctx->input(kDy))), ", got ",
                                ShapeOf(ArrayOf(ctx->input(kY)))));
    Tensor* dx = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, ctx->input(kDy).shape(), &dx));
    params.dy = ElementsOf(ctx->input(kDy));
    params.y = ElementsOf(ctx->input(kY));
    params.dx = ElementsOf(*dx);
    Device::RunGrad(ctx, params);
  }
};

// ---- partial autoregressive mask ----

template <class Device>
class AutoregressiveMaskOp : public BlocksOp {
 public:
  explicit AutoregressiveMaskOp(OpKernelConstruction* ctx) : BlocksOp(ctx) {
    OP_REQUIRES_OK(ctx, GetSize(ctx, "ctx_blks_k", &kv_blocks_));
  }

  void Compute(OpKernelContext* ctx) override {
    constexpr int64 kAnyQBlocks = kMostOfASize;  // no attribute tells, no memory depends on it
    const Tensor &mask = ctx->input(kMaskIn), &lut = ctx->input(kPlaces), &key = ctx->input(kKey);
    SpattnBlocksMask params = {};
    OP_REQUIRES_OK(ctx, CheckMask(mask));
    OP_REQUIRES_OK(ctx, ToStatus(CheckArray("autoregress_at_k", ArrayOf(key), {})));
    const int64 heads = mask.dim_size(0);
    OP_REQUIRES_OK(ctx, CheckHeads("mask", heads));
    OP_REQUIRES_OK(ctx, ToStatus(CheckArray("lut", ArrayOf(lut), {heads, blocks_, 2})));
    OP_REQUIRES_OK(ctx, ReadLut("lut", lut, heads, 0, &params.lut));
    params.blocks = {1,
                     static_cast<int32_t>(heads),
                     static_cast<int32_t>(block_size_),
                     blocks_,
                     kAnyQBlocks,
                     kv_blocks_};
    params.key = key.dtype() == tensorflow::DT_INT64 ? *DataOf<int64>(key) : *DataOf<int32_t>(key);
    Tensor* mask_out = nullptr;
    OP_REQUIRES_OK(ctx, ctx->allocate_output(0, mask.shape(), &mask_out));
    params.mask = DataOf<void>(mask);
    params.mask_out = DataOf<void>(*mask_out);
    Device::Run(ctx, params);
  }

 private:
  int64 kv_blocks_;
};

#define SPATTN_KERNEL(name, DEVICE, ...) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE), __VA_ARGS__)
#define SPATTN_KERNEL_WITH(host_input, name, DEVICE, ...) \
  REGISTER_KERNEL_BUILDER(Name(name).Device(tensorflow::DEVICE).HostMemory(host_input), __VA_ARGS__)
#define SPATTN_REGISTER(DEVICE, On)                                                  \
  SPATTN_KERNEL("BlocksparseTransformerNT", DEVICE, MatmulOp<On, kNt>);              \
  SPATTN_KERNEL("BlocksparseTransformerNN", DEVICE, MatmulOp<On, kNn>);              \
  SPATTN_KERNEL("BlocksparseTransformerTN", DEVICE, MatmulOp<On, kTn>);              \
  SPATTN_KERNEL_WITH("scale", "BlocksparseMaskedSoftmax", DEVICE, SoftmaxFwdOp<On>); \
  SPATTN_KERNEL_WITH("scale", "BlocksparseSoftmax", DEVICE, SoftmaxFwdOp<On>);       \
  SPATTN_KERNEL_WITH("scale", "BlocksparseSoftmaxGrad", DEVICE, SoftmaxGradOp<On>);  \
  SPATTN_KERNEL_WITH("autoregress_at_k", "BstPartialAutoregressiveMask", DEVICE,     \
                     AutoregressiveMaskOp<On>)
SPATTN_REGISTER(DEVICE_CPU, OnCpu);
SPATTN_REGISTER(DEVICE_GPU, OnGpu);

}  // namespace
}  // namespace spattn
