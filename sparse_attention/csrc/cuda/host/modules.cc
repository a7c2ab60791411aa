// modules.cc — loads kernels and launches them.
#include "cuda/host/modules.h"

#include <string.h>

#include <map>
#include <mutex>
#include <string>
#include <tuple>

namespace spattn {
namespace {

// Where kernels come from, and those that were loaded: into each context its own.
struct Kernels {
  std::mutex mutex;
  SpattnCudaCode code = nullptr;
  int arch = 0;
  std::map<CuHandle, int> archs;  // of each context
  std::map<std::tuple<CuHandle, int, std::string>, CuHandle> functions;
};

Kernels& TheKernels() {
  static Kernels* kernels = new Kernels;  // never destroyed: threads may outlive main
  return *kernels;
}

SpattnStatus FindArch(const Driver& driver, CuHandle context, int* arch) {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
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

SpattnStatus FindFunction(const Driver& driver, CuHandle context, int arch,
                          const SpattnCudaKernel& kernel, CuHandle* function) {
  Kernels& kernels = TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  CuHandle& found = kernels.functions[{context, arch, std::string(kernel.name) + kernel.macros}];
  if (found == nullptr) {
    if (kernels.code == nullptr) {
      return Failed(SPATTN_UNSUPPORTED, "no code for CUDA kernels: spattn_cuda_set_code first");
    }
    const void* code = nullptr;
    SpattnStatus status = Ok();
    kernels.code(&kernel, arch, &code, &status);
    SPATTN_RETURN_IF_ERROR(status);
    CuHandle module, loaded;
    SPATTN_RETURN_IF_ERROR(
        driver.Check(driver.cuModuleLoadData(&module, code), "cuModuleLoadData"));
    SPATTN_RETURN_IF_ERROR(driver.Check(driver.cuModuleGetFunction(&loaded, module, kernel.name),
                                        "cuModuleGetFunction"));
    SPATTN_RETURN_IF_ERROR(driver.Check(
        driver.cuFuncSetAttribute(loaded, kFuncMaxDynamicSharedMemory, kernel.shared_memory),
        "cuFuncSetAttribute"));
    found = loaded;
  }
  *function = found;
  return Ok();
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

SpattnStatus Stream::Launch(const SpattnCudaKernel& kernel, const void* params, int64_t x,
                            int64_t y, int64_t z) const {
  if (x == 0 || y == 0 || z == 0) return Ok();
  CuHandle function;
  SPATTN_RETURN_IF_ERROR(FindFunction(*driver_, context_, arch_, kernel, &function));
  void* arguments[] = {const_cast<void*>(params)};
  return driver_->Check(
      driver_->cuLaunchKernel(function, static_cast<unsigned>(x), static_cast<unsigned>(y),
                              static_cast<unsigned>(z), static_cast<unsigned>(kernel.threads), 1, 1,
                              static_cast<unsigned>(kernel.shared_memory), stream_, arguments,
                              nullptr),
      kernel.name);
}

}  // namespace spattn

// ---- C ABI ----

void spattn_cuda_set_code(SpattnCudaCode code, int32_t arch) {
  spattn::Kernels& kernels = spattn::TheKernels();
  const std::lock_guard<std::mutex> lock(kernels.mutex);
  kernels.code = code;
  kernels.arch = arch;
}
