// binding.h — between TensorFlow's tensors and statuses and the core's.
#ifndef SPARSE_ATTENTION_TF_BINDING_H_
#define SPARSE_ATTENTION_TF_BINDING_H_

#include <string>

#include "abi/core.h"
#include "tensorflow/core/framework/op_kernel.h"
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

inline tensorflow::Status CheckShape(const char* name, const tensorflow::Tensor& tensor,
                                     const tensorflow::TensorShape& expected) {
  if (tensor.shape() == expected) return tensorflow::Status();
  return tensorflow::errors::InvalidArgument(name, " must have shape ", expected.DebugString(),
                                             ", got ", tensor.shape().DebugString());
}

inline tensorflow::Status ToStatus(const SpattnStatus& status) {
  if (status.code == SPATTN_OK) return tensorflow::Status();
  const std::string message(status.message);
  if (status.code == SPATTN_UNSUPPORTED) return tensorflow::errors::Unimplemented(message);
  if (status.code == SPATTN_INTERNAL) return tensorflow::errors::Internal(message);
  return tensorflow::errors::InvalidArgument(message);
}

// Asks the core for its workspace, takes it from TensorFlow's allocator and makes the call.
template <class Params>
void RunOnCpu(tensorflow::OpKernelContext* ctx, const Params& params,
              SpattnStatus (*workspace_bytes)(const Params*, int32_t, int64_t*),
              SpattnStatus (*call)(const Params*, const SpattnThreads*, void*)) {
  const SpattnThreads threads = WorkerPool(ctx);
  int64_t bytes = 0;
  OP_REQUIRES_OK(ctx, ToStatus(workspace_bytes(&params, threads.workers, &bytes)));
  tensorflow::Tensor workspace;
  OP_REQUIRES_OK(ctx, ctx->allocate_temp(tensorflow::DT_UINT8,
                                         tensorflow::TensorShape({bytes + 64}), &workspace));
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(DataOf<char>(workspace)) + 63) / 64 * 64;
  OP_REQUIRES_OK(ctx, ToStatus(call(&params, &threads, reinterpret_cast<void*>(aligned))));
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_BINDING_H_
