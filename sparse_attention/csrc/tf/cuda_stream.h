// cuda_stream.h — the CUstream that TensorFlow runs an op on, whichever of its headers tell.
//
// From 2.19 on, tensorflow/core/platform/stream_executor.h includes headers of LLVM that the pip
// package does not ship; what is needed here lies in xla/stream_executor/stream.h from 2.12 on.
#ifndef SPARSE_ATTENTION_TF_CUDA_STREAM_H_
#define SPARSE_ATTENTION_TF_CUDA_STREAM_H_

#include "tensorflow/core/framework/op_kernel.h"
#if __has_include("xla/stream_executor/stream.h")
#include "xla/stream_executor/stream.h"
#else
#include "tensorflow/core/platform/stream_executor.h"
#endif

namespace spattn {

template <class Stream>
auto StreamHandle(Stream* stream, int) -> decltype(stream->platform_specific_handle().stream) {
  return stream->platform_specific_handle().stream;
}

template <class Stream>  // TensorFlow 1
auto StreamHandle(Stream* stream, ...) -> decltype(stream->implementation()->GpuStreamHack()) {
  return stream->implementation()->GpuStreamHack();
}

inline void* CudaStream(tensorflow::OpKernelContext* ctx) {
  return StreamHandle(ctx->op_device_context()->stream(), 0);
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_CUDA_STREAM_H_
