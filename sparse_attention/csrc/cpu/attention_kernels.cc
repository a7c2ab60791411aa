// attention_kernels.cc — fused attention for one instruction set; -DSPATTN_ISA names it.
#include "cpu/attention_kernels.h"

#include "cpu/attention_bwd.h"
#include "cpu/attention_fwd.h"

namespace spattn {
namespace SPATTN_ISA {

const AttentionKernels kAttentionKernels = {FwdWorkspace, BwdWorkspace, Fwd, Bwd};

}  // namespace SPATTN_ISA
}  // namespace spattn
