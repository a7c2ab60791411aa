// kernels.cc — the CPU kernels for one instruction set, named by -DSPATTN_ISA=baseline, avx2 or avx512.
#include "kernels.h"

#include "attention_bwd.h"
#include "attention_fwd.h"

namespace spattn {
namespace SPATTN_ISA {

const CpuKernels kKernels = {FwdWorkspace, BwdWorkspace, Fwd, Bwd};

}  // namespace SPATTN_ISA
}  // namespace spattn
