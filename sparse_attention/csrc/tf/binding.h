// binding.h — between TensorFlow's tensors and statuses and the core's.
#ifndef SPARSE_ATTENTION_TF_BINDING_H_
#define SPARSE_ATTENTION_TF_BINDING_H_

#include <algorithm>
#include <initializer_list>
#include <string>

#include "abi/core.h"
#include "abi/own_integers.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/framework/shape_inference.h"
#include "tf/array.h"
#include "tf/worker_pool.h"

#define SPATTN_TF_RETURN_IF_ERROR(expression)          \
  do {                                                 \
    const ::tensorflow::Status status_ = (expression); \
    if (!status_.ok()) return status_;                 \
  } while (false)

namespace spattn {

template <class T>
T* DataOf(const tensorflow::Tensor& tensor) {
  return reinterpret_cast<T*>(const_cast<char*>(tensor.tensor_data().data()));
}

inline int32_t DtypeOf(const tensorflow::Tensor& tensor) {
  return tensor.dtype() == tensorflow::DT_FLOAT  ? SPATTN_FLOAT32
         : tensor.dtype() == tensorflow::DT_HALF ? SPATTN_FLOAT16
                                                 : SPATTN_BFLOAT16;
}

inline Array ArrayOf(const tensorflow::Tensor& tensor) {
  return Array(DataOf<void>(tensor), tensor.dims(), [&](int i) { return tensor.dim_size(i); });
}

inline tensorflow::Status ToStatus(const SpattnStatus& status) {
  if (status.code == SPATTN_OK) return tensorflow::Status();
  const std::string message(status.message);
  if (status.code == SPATTN_UNSUPPORTED) return tensorflow::errors::Unimplemented(message);
  if (status.code == SPATTN_INTERNAL) return tensorflow::errors::Internal(message);
  return tensorflow::errors::InvalidArgument(message);
}

// Gives an output the shape, if what is known of it can be that of a tensor: whoever optimizes a graph
// multiplies the sizes.
inline tensorflow::Status SetOutput(tensorflow::shape_inference::InferenceContext* c, int i,
                                    const char* name,
                                    tensorflow::shape_inference::ShapeHandle shape) {
  const Array known(nullptr, c->Rank(shape), [&](int dim) { return c->Value(c->Dim(shape, dim)); });
  SPATTN_TF_RETURN_IF_ERROR(ToStatus(CheckElements(name, known.dims, known.rank)));
  c->set_output(i, shape);
  return tensorflow::Status();
}

// Allocates output i with sizes of any value: what no tensor can have is an error.
inline tensorflow::Status AllocateOutput(tensorflow::OpKernelContext* ctx, int i,
                                         std::initializer_list<int64_t> dims,
                                         tensorflow::Tensor** output) {
  tensorflow::int64 sizes[Array::kMostDims];  // in TensorFlow 1 that is another type
  std::copy(dims.begin(), dims.end(), sizes);
  tensorflow::TensorShape shape;
  SPATTN_TF_RETURN_IF_ERROR(tensorflow::TensorShapeUtils::MakeShape(
      sizes, static_cast<tensorflow::int64>(dims.size()), &shape));
  return ctx->allocate_output(i, shape, output);
}

// Gives the params integers of their own, in `memory`.
template <class Params>
tensorflow::Status OwnIntegers(tensorflow::OpKernelContext* ctx, Params* params,
                               tensorflow::Tensor* memory) {
  const tensorflow::TensorShape shape({CountIntegers(*params)});
  SPATTN_TF_RETURN_IF_ERROR(ctx->allocate_temp(tensorflow::DT_INT32, shape, memory));
  OwnIntegers(params, DataOf<int32_t>(*memory));
  return tensorflow::Status();
}

// Asks the core for its workspace, takes it from TensorFlow's allocator and makes the call.
template <class Params>
void RunOnCpu(tensorflow::OpKernelContext* ctx, Params params,
              SpattnStatus (*workspace_bytes)(const Params*, int32_t, int64_t*),
              SpattnStatus (*call)(const Params*, const SpattnThreads*, void*)) {
  tensorflow::Tensor integers, workspace;
  OP_REQUIRES_OK(ctx, OwnIntegers(ctx, &params, &integers));
  const SpattnThreads threads = WorkerPool(ctx);
  int64_t bytes = 0;
  OP_REQUIRES_OK(ctx, ToStatus(workspace_bytes(&params, threads.workers, &bytes)));
  OP_REQUIRES_OK(ctx, ctx->allocate_temp(tensorflow::DT_UINT8,
                                         tensorflow::TensorShape({bytes + 64}), &workspace));
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(DataOf<char>(workspace)) + 63) / 64 * 64;
  OP_REQUIRES_OK(ctx, ToStatus(call(&params, &threads, reinterpret_cast<void*>(aligned))));
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_BINDING_H_
