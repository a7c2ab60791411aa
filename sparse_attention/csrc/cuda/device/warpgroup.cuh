// warpgroup.cuh — what kernels for sm_90a are made of whose warp groups have different work: mbarriers
// between those that copy and those that multiply, bulk copies, named barriers within and between
// groups, and the registers that one group gives to another.
#pragma once
#include "cuda/device/device.cuh"

namespace spattn {

constexpr int kGroupThreads = 128;  // a warp group: four warps, as wgmma wants them

// ---- mbarriers ----
//
// A barrier in shared memory completes a phase when `arrivals` threads have arrived. Waiting for parity
// 0 waits for phases 0, 2, 4, ...; waiting for parity 1 on a new barrier returns at once.

struct Mbarrier {
  uint64_t state;

  __forceinline__ void Init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(SmemAddress(this)), "r"(arrivals)
                 : "memory");
  }
  // What this thread wrote before is visible to whoever has waited.
  __forceinline__ void Arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(SmemAddress(this)) : "memory");
  }
  // Arrives, and keeps the phase from completing until so many bytes have come by CopyBox.
  __forceinline__ void ArriveAndExpect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(SmemAddress(this)),
                 "r"(bytes)
                 : "memory");
  }
  __forceinline__ void Wait(int parity) {
    asm volatile(
        "{.reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;}" ::"r"(SmemAddress(this)),
        "r"(parity)
        : "memory");
  }
};

// Makes Init visible; a barrier of the CTA must follow.
DEVICE void FenceMbarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// ---- tensor maps ----

// Copies a box of a tensor [batch, rows, heads, dim] to shared memory, elements that do not exist as
// zeros; its bytes count towards the barrier's phase. The map has the size of the box, and swizzles as
// a Tile does.
DEVICE void CopyBox(T* to, const SpattnTensorMap& map, int column, int row, int head, int batch,
                    Mbarrier& arrived) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(SmemAddress(to)),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(SmemAddress(&arrived))
      : "memory");
}

// ---- bulk copies ----

// Copies shared memory to device memory, or adds it there, float by float; each addition is atomic.
// Both are at multiples of 16 bytes, and what other threads wrote to `from` they have fenced
// (FenceForWgmma) before a barrier. Then BulkCommit, and one of the two waits.
DEVICE void BulkStore(float* to, const float* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to),
               "r"(SmemAddress(from)), "r"(bytes)
               : "memory");
}
DEVICE void BulkAdd(float* to, const float* from, int bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to),
      "r"(SmemAddress(from)), "r"(bytes)
      : "memory");
}
DEVICE void BulkCommit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until shared memory has been read by all that this thread committed.
DEVICE void BulkWaitForReads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
// Waits until all of it is in device memory.
DEVICE void BulkWait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- counters in device memory ----

// Waits until others have made the counter `value`. What they wrote before AddRelease, by bulk copies
// that they have waited for too, has happened before what this thread does now.
DEVICE void WaitForCount(const int32_t* counter, int value) {
  int count;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  } while (count != value);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
DEVICE void AddRelease(int32_t* counter) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}

// ---- named barriers ----

// Waits until `threads` threads have come to barrier `id`, by either of these two.
DEVICE void BarrierSync(int id, int threads) {
  asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
DEVICE void BarrierArrive(int id, int threads) {
  asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// Waits as BarrierSync does; whether `value` holds in any of the threads.
DEVICE bool BarrierOr(int id, int threads, bool value) {
  int any;
  asm volatile(
      "{.reg .pred mine, any;\n"
      "setp.ne.s32 mine, %3, 0;\n"
      "barrier.cta.red.or.aligned.pred any, %1, %2, mine;\n"
      "selp.s32 %0, 1, 0, any;}"
      : "=r"(any)
      : "r"(id), "r"(threads), "r"(static_cast<int>(value))
      : "memory");
  return any;
}

// ---- registers ----

// All warps of a group call one of the two, once.
template <int kRegisters>
DEVICE void GiveRegisters() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE void TakeRegisters() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace spattn
