// worker_pool.h — TensorFlow's intra-op thread pool as the core's SpattnThreads.
#ifndef SPARSE_ATTENTION_TF_WORKER_POOL_H_
#define SPARSE_ATTENTION_TF_WORKER_POOL_H_

#include "abi/core.h"
#include "tensorflow/core/framework/device_base.h"
#include "tensorflow/core/framework/op_kernel.h"
#include "tensorflow/core/lib/core/threadpool.h"

namespace spattn {

inline void RunInWorkerPool(void* pool, int32_t workers, void (*work)(void*, int32_t), void* arg) {
  constexpr tensorflow::int64 kCyclesPerWorker = 1 << 30;  // so many that each gets its own thread
  static_cast<tensorflow::thread::ThreadPool*>(pool)->ParallelFor(
      workers, kCyclesPerWorker, [work, arg](tensorflow::int64 begin, tensorflow::int64 end) {
        for (tensorflow::int64 w = begin; w < end; ++w) work(arg, static_cast<int32_t>(w));
      });
}

inline SpattnThreads WorkerPool(tensorflow::OpKernelContext* ctx) {
  const auto* threads = ctx->device()->tensorflow_cpu_worker_threads();
  return {threads->num_threads, threads->workers, RunInWorkerPool};
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_TF_WORKER_POOL_H_
