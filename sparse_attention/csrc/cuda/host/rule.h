// rule.h — a SpattnScoreRule on a GPU: what of it is in use, and what kernels prepare in a workspace before
// the attention.
#ifndef SPARSE_ATTENTION_CUDA_HOST_RULE_H_
#define SPARSE_ATTENTION_CUDA_HOST_RULE_H_

#include "cuda/host/modules.h"

namespace spattn {

// Parts of a workspace one after the other, at multiples of 64 bytes. Without a base it counts alone.
class DeviceArena {
 public:
  explicit DeviceArena(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* Take(int64_t count) {
    char* at = base_ == nullptr ? nullptr : base_ + bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

class RuleOnDevice {
 public:
  // Checks the rule and takes its parts of the workspace. by_kv: null in the forward pass;
  // drelative_bias: null where nobody wants it.
  SpattnStatus Init(const SpattnProblem& problem, const SpattnScoreRule& rule,
                    const SpattnPlan& by_q, const SpattnKvPlan* by_kv, float* drelative_bias,
                    DeviceArena* arena);

  int parts() const { return parts_; }  // SpattnRuleParts
  // Whether lists are written of what the rule leaves of the plans.
  bool LeavesLists() const { return parts_ & (SPATTN_RULE_SEGMENTS | SPATTN_RULE_MASK); }
  const SpattnCudaRule& params() const { return rule_; }

  // Puts the kernels that prepare the rule on the stream, and has the plans list what is left; null:
  // nobody reads that one.
  SpattnStatus Prepare(const Stream& stream, SpattnTilePlan* by_q, SpattnTilePlan* by_kv);

  // The slices into which attention_bwd_dq parts the tiles of a head to add up the gradient of
  // relative_bias; 0 where it does not.
  int32_t slices() const { return rule_.slices; }
  // What a head of a slice has; 0 where nobody wants that gradient.
  int64_t SliceFloats() const {
    return drelative_bias_ == nullptr ? 0 : 2 * int64_t{rule_.sum_reach} - 1;
  }
  // In place of these, `slices` that attention_bwd_sm90 writes to `sums`.
  void UseSlices(int32_t slices, float* sums) { rule_.slices = slices, rule_.bias_sums = sums; }
  // Sums up the slices, behind the kernel that writes them.
  SpattnStatus SumSlices(const Stream& stream) const;

 private:
  struct Lists {
    int32_t *indices, *mask_ids, *ends;
    int32_t block_size, tile;
  };

  template <class Params>
  SpattnStatus Launch(const Stream& stream, int phase, const Params& params, int64_t threads) const;
  SpattnStatus LeaveLists(const Stream& stream, const Lists& lists, SpattnTilePlan* plan) const;

  SpattnProblem problem_;
  SpattnCudaRule rule_ = {};
  const int64_t* dropout_seed_ = nullptr;
  float* drelative_bias_ = nullptr;
  int parts_ = 0;
  int32_t q_blocks_ = 0, kv_blocks_ = 0;
  int64_t pairs_batch_ = 1;  // of pair_kinds
  Lists by_q_ = {}, by_kv_ = {};
};

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CUDA_HOST_RULE_H_
