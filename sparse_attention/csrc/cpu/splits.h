// splits.h — how the backward pass divides the q tiles of a head among tasks.
#ifndef SPARSE_ATTENTION_CPU_SPLITS_H_
#define SPARSE_ATTENTION_CPU_SPLITS_H_

#include "cpu/tiles.h"

namespace spattn {
namespace SPATTN_ISA {

constexpr int64_t kMinTasks = 16;  // the queries are split where there are fewer heads than this

// The runs of q tiles and, for each, the kv positions its dk and dv sums cover.
class Splits {
 public:
  explicit Splits(const SpattnBwdParams& params)
      : problem_(params.problem),
        plan_(params.plan),
        group_(problem_.heads / problem_.kv_heads),
        q_tiles_(QTilesWithRows(problem_, plan_)),
        kv_blocks_(KvBlocksWithRows(problem_, plan_)) {
    const int64_t heads = problem_.batch * problem_.kv_heads;
    count_ = Max(q_tiles_, 1);  // keys without queries have gradients too, which are 0
    // Every split has sums of its own for the bias's gradient, so they are few where it is asked for.
    if (!params.drelative_bias && AreApart()) return;
    count_ = heads > 0 ? Max(Min(CeilDiv(kMinTasks, heads), q_tiles_), 1) : 1;
    are_apart_ = count_ == 1;
  }

  int64_t count() const { return count_; }
  int64_t kv_blocks() const { return kv_blocks_; }
  bool are_apart() const { return are_apart_; }

  // Kv heads that may read different keys.
  int64_t groups() const { return plan_.heads == 1 ? 1 : problem_.kv_heads; }

  // First q tile of split s: where s / count of the head's blocks lie before it.
  int64_t FirstQTile(int64_t plan_head, int64_t s) const {
    const int32_t* indptr = plan_.kv_indptr + plan_head * plan_.q_tiles;
    const int64_t blocks = indptr[q_tiles_] - indptr[0];
    const int64_t target = indptr[0] + blocks * s / count_;
    if (s == count_) return q_tiles_;
    int64_t low = 0, high = q_tiles_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (indptr[middle] < target) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  }

  int64_t PlanHead(int64_t head) const { return plan_.heads == 1 ? 0 : head; }

  // Positions [*begin, *end) of the keys that split s of kv_head may read.
  void KvRange(int64_t kv_head, int64_t s, int64_t* begin, int64_t* end) const {
    int64_t first = kv_blocks_, last = -1;
    for (int64_t head = kv_head * group_; head < (kv_head + 1) * group_; ++head) {
      const int32_t* indptr = plan_.kv_indptr + PlanHead(head) * plan_.q_tiles;
      const int64_t tile_end = FirstQTile(PlanHead(head), s + 1);
      for (int64_t tile = FirstQTile(PlanHead(head), s); tile < tile_end; ++tile) {
        if (indptr[tile] == indptr[tile + 1]) continue;  // kv_indices increase within a tile
        first = Min(first, plan_.kv_indices[indptr[tile]]);
        last = Max(last, plan_.kv_indices[indptr[tile + 1] - 1]);
      }
      if (plan_.heads == 1) break;
    }
    last = Min(last, kv_blocks_ - 1);
    first = Min(first, last + 1);
    *begin = last < 0 ? 0 : first * plan_.block_size;
    *end = (last + 1) * plan_.block_size;
  }

 private:
  const SpattnProblem& problem_;
  const SpattnPlan& plan_;
  // Whether each split's keys lie past those of the splits before it.
  bool AreApart() const {
    for (int64_t kv_head = 0; kv_head < groups(); ++kv_head) {
      int64_t past = 0;
      for (int64_t s = 0; s < count_; ++s) {
        int64_t begin, end;
        KvRange(kv_head, s, &begin, &end);
        if (begin < end && begin < past) return false;
        past = Max(past, end);
      }
    }
    return true;
  }

  int64_t group_, q_tiles_, kv_blocks_, count_;  // tiles and blocks: those that hold rows
  bool are_apart_ = true;
};

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_SPLITS_H_
