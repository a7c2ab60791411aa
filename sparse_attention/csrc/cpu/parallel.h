// parallel.h — tasks over the caller's threads.
//
// Which worker takes which task is a race; no result may depend on it. Denormals are flushed to zero
// while tasks run, in the caller's thread as in any other, so that no result depends on how the
// thread was set up either.
#ifndef SPARSE_ATTENTION_CPU_PARALLEL_H_
#define SPARSE_ATTENTION_CPU_PARALLEL_H_

#include "abi/core.h"
#include "cpu/simd.h"

namespace spattn {
namespace SPATTN_ISA {

class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  uint32_t saved_;
#endif
};

// Calls body(task, worker) for every task in [0, tasks), in increasing order of start.
template <class Body>
inline void ParallelFor(const SpattnThreads& threads, int64_t tasks, const Body& body) {
  struct Shared {
    const Body& body;
    int64_t tasks, next;
    static void Work(void* arg, int32_t worker) {
      Shared* shared = static_cast<Shared*>(arg);
      FlushDenormals flush;
      (void)flush;
      for (;;) {
        const int64_t task = __atomic_fetch_add(&shared->next, 1, __ATOMIC_RELAXED);
        if (task >= shared->tasks) return;
        shared->body(task, worker);
      }
    }
  } shared{body, tasks, 0};
  const int64_t workers = tasks < threads.workers ? tasks : threads.workers;
  if (workers > 1 && threads.run) {
    threads.run(threads.pool, static_cast<int32_t>(workers), &Shared::Work, &shared);
  } else {
    Shared::Work(&shared, 0);
  }
}

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_PARALLEL_H_
