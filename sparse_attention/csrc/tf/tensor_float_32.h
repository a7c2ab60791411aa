// tensor_float_32.h — whether TensorFlow's users allow float32 products to round their factors.
//
// tf.config.experimental.enable_tensor_float_32_execution sets it. All of TensorFlow 2 has the function,
// and its header in one of two places or both; TensorFlow 1 knows no TF32.
#ifndef SPARSE_ATTENTION_TF_TENSOR_FLOAT_32_H_
#define SPARSE_ATTENTION_TF_TENSOR_FLOAT_32_H_

#if __has_include("tsl/platform/tensor_float_32_utils.h") || \
                  __has_include("tensorflow/core/platform/tensor_float_32_utils.h")
#define SPATTN_HAS_TF32 1
namespace tsl {
bool tensor_float_32_execution_enabled();
}  // namespace tsl
#else
#define SPATTN_HAS_TF32 0
#endif

namespace spattn {

inline bool AllowsTf32() {
#if SPATTN_HAS_TF32
  return tsl::tensor_float_32_execution_enabled();
#else
  return false;
#endif
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_TENSOR_FLOAT_32_H_
