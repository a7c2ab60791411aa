// tensor_float_32.h — whether TensorFlow's users allow float32 products to round their factors.
//
// tf.config.experimental.enable_tensor_float_32_execution sets it. TensorFlow ships the function's
// header in some versions alone, and the function in all from 2.12 on.
#ifndef SPARSE_ATTENTION_TF_TENSOR_FLOAT_32_H_
#define SPARSE_ATTENTION_TF_TENSOR_FLOAT_32_H_

#include "tensorflow/core/public/version.h"

#if TF_MAJOR_VERSION >= 2
namespace tsl {
bool tensor_float_32_execution_enabled();
}  // namespace tsl
#endif

namespace spattn {

inline bool AllowsTf32() {
#if TF_MAJOR_VERSION >= 2
  return tsl::tensor_float_32_execution_enabled();
#else
  return false;  // TensorFlow 1 knows no TF32
#endif
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_TENSOR_FLOAT_32_H_
