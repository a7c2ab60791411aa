// targets.h — the names by which the lowered graph and the handlers find each other.
#ifndef SPARSE_ATTENTION_XLA_TARGETS_H_
#define SPARSE_ATTENTION_XLA_TARGETS_H_

namespace spattn {

constexpr char kFwdTarget[] = "sparse_attention_fwd", kBwdTarget[] = "sparse_attention_bwd";

}  // namespace spattn

#endif  // SPARSE_ATTENTION_XLA_TARGETS_H_
