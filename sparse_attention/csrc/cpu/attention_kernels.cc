// attention_kernels.cc — fused attention for one instruction set; -DSPATTN_ISA names it.
#include "attention_kernels.h"

#include "attention_bwd.h"
#include "attention_fwd.h"

namespace spattn {
namespace SPATTN_ISA {

const AttentionKernels kAttentionKernels = {FwdWorkspace, BwdWorkspace, Fwd, Bwd};

}  // namespace SPATTN_ISA
}  // namespace spattn
