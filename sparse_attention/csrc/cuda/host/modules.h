// modules.h — from a kernel's name and macros to its launch: its code comes from SpattnCudaCode
// when it is first needed and stays loaded.
#ifndef SPARSE_ATTENTION_CUDA_HOST_MODULES_H_
#define SPARSE_ATTENTION_CUDA_HOST_MODULES_H_

#include "cuda/host/driver.h"

namespace spattn {

constexpr int64_t kMaxGrid = 65535;  // in y and z; kMaxGridX in x
constexpr int64_t kMaxGridX = (int64_t{1} << 31) - 1;

// Bytes of shared memory that one CTA may use.
int SharedMemoryOf(int arch);

inline int ElementSize(int dtype) { return dtype == SPATTN_FLOAT32 ? 4 : 2; }

// Bytes of shared memory in which a warp turns wmma's fragments, `columns` at a time, into rows: of
// matmul.cuh's ScratchBytes.
inline int ScratchBytes(int columns, int dtype, int arch) {
  const bool has_wmma = dtype != SPATTN_FLOAT32 && arch < 80;
  return has_wmma ? 16 * (20 * 4 + (columns + 8) * 2) : 0;
}

// Adds "-DSPATTN_<name>=<value>" to what a kernel is compiled with.
void Define(SpattnCudaKernel* kernel, const char* name, int value);

// A stream of the context that is current.
class Stream {
 public:
  SpattnStatus Open(void* stream);

  int arch() const { return arch_; }  // compute capability, as 80 of 8.0

  // Launches a grid of x * y * z CTAs, if any. `params` is the kernel's one argument.
  SpattnStatus Launch(const SpattnCudaKernel& kernel, const void* params, int64_t x, int64_t y,
                      int64_t z) const;

 private:
  const Driver* driver_ = nullptr;
  CuHandle context_ = nullptr, stream_ = nullptr;
  int arch_ = 0;
};

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CUDA_HOST_MODULES_H_
