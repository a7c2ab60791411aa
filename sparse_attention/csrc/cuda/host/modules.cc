// modules.cc — loads kernels and launches them.
#include "cuda/host/modules.h"

#include <stdio.h>

#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace spattn {
namespace {

// A kernel of one context, loaded or not yet.
struct Slot {
  std::mutex loading;  // held by the thread that loads it; others that want it wait
  std::atomic<bool> is_loaded{false};
  LoadedKernel kernel;
};

struct Kernels {
  // Held for a look into the tables alone. Slots are never removed, so they stay where they are.
  std::mutex tables;
  std::map<CuHandle, int> archs;  // of each context
  std::map<std::pair<CuHandle, KernelKey>, Slot> slots;
  SpattnCudaCode code = nullptr;  // where kernels come from, and what they are compiled for
  int arch = 0;

  std::mutex coding;  // held while `code` runs: one thread at a time may call it
};

Kernels& TheKernels() {
  static Kernels* kernels = new Kernels;  // never destroyed: threads may outlive main
  return *kernels;
}

SpattnStatus FindArch(const Driver& driver, CuHandle context, int* arch) {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.tables);
  if (kernels.arch == 0 && kernels.archs.count(context) == 0) {
    int device, major, minor;
    SPATTN_RETURN_IF_ERROR(driver.Check(driver.cuCtxGetDevice(&device), "cuCtxGetDevice"));
    SPATTN_RETURN_IF_ERROR(
        driver.Check(driver.cuDeviceGetAttribute(&major, kDeviceCapabilityMajor, device),
                     "cuDeviceGetAttribute"));
    SPATTN_RETURN_IF_ERROR(
        driver.Check(driver.cuDeviceGetAttribute(&minor, kDeviceCapabilityMinor, device),
                     "cuDeviceGetAttribute"));
    kernels.archs[context] = major * 10 + minor;
  }
  *arch = kernels.arch != 0 ? kernels.arch : kernels.archs[context];
  return Ok();
}

// While it lives, this thread may do what a stream that is being recorded into a graph forbids.
class RelaxedCapture {
 public:
  explicit RelaxedCapture(const Driver& driver) : driver_(driver) { Exchange(); }
  RelaxedCapture(const RelaxedCapture&) = delete;
  ~RelaxedCapture() { Exchange(); }

 private:
  void Exchange() { driver_.cuThreadExchangeStreamCaptureMode(&mode_); }

  const Driver& driver_;
  int mode_ = kCaptureRelaxed;  // then what was before
};

SpattnStatus Load(const Driver& driver, int arch, LoadedKernel* kernel) {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.coding);  // also until the code is loaded
  if (kernels.code == nullptr) {
    return Failed(SPATTN_UNSUPPORTED, "no code for CUDA kernels: spattn_cuda_set_code first");
  }
  const void* code = nullptr;
  SpattnStatus status = Ok();
  kernels.code(&kernel->config, arch, &code, &status);
  SPATTN_RETURN_IF_ERROR(status);
  // A first call may be recorded into a graph: loading is no part of what is recorded.
  const RelaxedCapture relaxed(driver);
  CuHandle module;
  SPATTN_RETURN_IF_ERROR(driver.Check(driver.cuModuleLoadData(&module, code), "cuModuleLoadData"));
  SPATTN_RETURN_IF_ERROR(
      driver.Check(driver.cuModuleGetFunction(&kernel->function, module, kernel->config.name),
                   "cuModuleGetFunction"));
  return driver.Check(driver.cuFuncSetAttribute(kernel->function, kFuncMaxDynamicSharedMemory,
                                                kernel->config.shared_memory),
                      "cuFuncSetAttribute");
}

}  // namespace

int SharedMemoryOf(int arch) {
  const int kib = arch == 75                 ? 64
                  : arch < 80                ? 96
                  : arch == 80 || arch == 87 ? 163
                  : arch >= 90 && arch < 120 ? 227
                                             : 99;
  return kib * 1024;
}

void Define(SpattnCudaKernel* kernel, const char* name, int value) {
  const size_t length = strlen(kernel->macros);
  snprintf(kernel->macros + length, sizeof(kernel->macros) - length, "%s-DSPATTN_%s=%d",
           length == 0 ? "" : " ", name, value);
}

SpattnStatus Stream::Open(void* stream) {
  SPATTN_RETURN_IF_ERROR(OpenDriver(&driver_));
  SPATTN_RETURN_IF_ERROR(driver_->Check(driver_->cuCtxGetCurrent(&context_), "cuCtxGetCurrent"));
  if (context_ == nullptr) return Failed(SPATTN_INTERNAL, "no CUDA context is current");
  stream_ = stream;
  return FindArch(*driver_, context_, &arch_);
}

SpattnStatus Stream::FindByKey(const KernelKey& key, const void* closure, CallConfigure configure,
                               const LoadedKernel** kernel) const {
  Kernels& kernels = TheKernels();
  Slot* slot;
  {
    const std::lock_guard<std::mutex> lock(kernels.tables);
    slot = &kernels.slots[{context_, key}];
  }
  if (!slot->is_loaded.load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(slot->loading);
    if (!slot->is_loaded.load(std::memory_order_relaxed)) {
      SPATTN_RETURN_IF_ERROR(configure(closure, &slot->kernel.config));
      SPATTN_RETURN_IF_ERROR(Load(*driver_, arch_, &slot->kernel));
      slot->is_loaded.store(true, std::memory_order_release);
    }
  }
  *kernel = &slot->kernel;
  return Ok();
}

SpattnStatus Stream::CountMultiprocessors(int* count) const {
  int device;
  SPATTN_RETURN_IF_ERROR(driver_->Check(driver_->cuCtxGetDevice(&device), "cuCtxGetDevice"));
  return driver_->Check(driver_->cuDeviceGetAttribute(count, kDeviceMultiprocessors, device),
                        "cuDeviceGetAttribute");
}

bool Stream::MakeMap(const SpattnTensor& tensor, int dtype, int64_t batch, int64_t rows, int heads,
                     int dim, int box_rows, SpattnTensorMap* map) const {
  if (driver_->cuTensorMapEncodeTiled == nullptr) return false;
  const auto bytes = [](int64_t stride) { return static_cast<uint64_t>(stride) * 2; };
  const uint64_t sizes[] = {static_cast<uint64_t>(dim), static_cast<uint64_t>(rows),
                            static_cast<uint64_t>(heads), static_cast<uint64_t>(batch)};
  const uint64_t strides[] = {bytes(tensor.row_stride), bytes(tensor.head_stride),
                              bytes(tensor.batch_stride)};
  const unsigned box[] = {64, static_cast<unsigned>(box_rows), 1, 1}, ones[] = {1, 1, 1, 1};
  return driver_->cuTensorMapEncodeTiled(
             map, dtype == SPATTN_BFLOAT16 ? kTensorMapBfloat16 : kTensorMapFloat16, 4, tensor.data,
             sizes, strides, box, ones, 0, kTensorMapSwizzle128, kTensorMapPromote256, 0) == 0;
}

SpattnStatus Stream::Zero(void* words, int64_t count) const {
  return driver_->Check(driver_->cuMemsetD32Async(reinterpret_cast<uint64_t>(words), 0,
                                                  static_cast<size_t>(count), stream_),
                        "cuMemsetD32Async");
}

SpattnStatus Stream::Launch(const LoadedKernel& kernel, const void* params, int64_t x, int64_t y,
                            int64_t z) const {
  if (x == 0 || y == 0 || z == 0) return Ok();
  void* arguments[] = {const_cast<void*>(params)};
  return driver_->Check(driver_->cuLaunchKernel(kernel.function, static_cast<unsigned>(x),
                                                static_cast<unsigned>(y), static_cast<unsigned>(z),
                                                static_cast<unsigned>(kernel.config.threads), 1, 1,
                                                static_cast<unsigned>(kernel.config.shared_memory),
                                                stream_, arguments, nullptr),
                        kernel.config.name);
}

}  // namespace spattn

// ---- C ABI ----

void spattn_cuda_set_code(SpattnCudaCode code, int32_t arch) {
  spattn::Kernels& kernels = spattn::TheKernels();
  const std::lock_guard<std::mutex> coding(kernels.coding);
  const std::lock_guard<std::mutex> tables(kernels.tables);
  kernels.code = code;
  kernels.arch = arch;
}
