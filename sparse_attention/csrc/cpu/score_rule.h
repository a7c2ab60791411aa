// score_rule.h — what stands between q kT and the softmax besides the plan (SpattnScoreRule).
//
// Who may attend to whom (segments, mask) joins the bits that a key tile has for PARTIAL blocks, so all
// that keeps masked keys out of sums holds for them; keys to which nobody in a q tile attends are
// not even loaded. What changes a score, or a weight, is a pass over the scores of one panel, which
// lie in the L1 cache. Without a rule none of this is called.
#ifndef SPARSE_ATTENTION_CPU_SCORE_RULE_H_
#define SPARSE_ATTENTION_CPU_SCORE_RULE_H_

#include "abi/score_rule.h"
#include "cpu/tiles.h"

namespace spattn {
namespace SPATTN_ISA {

// ---- scores of one panel ----

// tanh, relative error below 2e-7; NaN stays NaN.
//
// Near 0 it is x + x^3 P(x^2), P minimax in relative error (1e-9 before rounding); elsewhere
// 1 - 2 / (1 + e^2x), where nothing cancels.
SPATTN_INLINE Vec Tanh(Vec x) {
  const Vec z = x * x;
  Vec near_zero = z * -0x1.9b3016p-8f + 0x1.593cfep-6f;
  near_zero = near_zero * z - 0x1.b92878p-5f;
  near_zero = near_zero * z + 0x1.110d26p-3f;
  near_zero = near_zero * z - 0x1.55554ap-2f;
  near_zero = x + x * (z * near_zero);
  const Vec size = Select(x < 0.0f, -x, x);
  const Vec bounded = Select(size > 16.0f, Broadcast(16.0f), size);
  const Vec far = 1.0f - 2.0f / (1.0f + Exp2(bounded * (2 * kLog2E)));
  return Select(size < 0.55f, near_zero, Select(x < 0.0f, -far, far));
}

// Of every query of a task, for dropout.
struct RuleScratch {
  uint32_t *multipliers, *addends;  // [heads][kTileQ]
  uint32_t* key_bits;               // [kTileKV] of one head
  float* cap_slopes;                // [kTileKV, kPanel] derivative of the soft cap, of one panel

  RuleScratch() = default;
  RuleScratch(Arena* arena, int heads) {
    multipliers = arena->Take<uint32_t>(heads * kTileQ);
    addends = arena->Take<uint32_t>(heads * kTileQ);
    key_bits = arena->Take<uint32_t>(kTileKV);
    cap_slopes = arena->Take<float>(kTileKV * kPanel);
  }

  void SetQueries(const SpattnScoreRule& rule, int64_t b, int64_t head, const QTile& tile,
                  int h) const {
    if (rule.dropout_rate == 0) return;
    const PhiloxWords key = DropoutKey(rule.dropout_seed, b, head);
    for (int i = 0; i < tile.panels * kPanel; ++i) {
      const DropoutQuery query = DropoutOfQuery(key, tile.rows[i] + rule.q_offset);
      multipliers[h * kTileQ + i] = query.multiplier;
      addends[h * kTileQ + i] = query.addend;
    }
  }

  void SetKeys(const SpattnScoreRule& rule, int64_t b, int64_t head, const KeyTile& keys) const {
    if (rule.dropout_rate == 0) return;
    const PhiloxWords key = DropoutKey(rule.dropout_seed, b, head);
    for (int j = 0; j < keys.count; ++j) key_bits[j] = DropoutOfKey(key, keys.rows[j]);
  }
};

// The rule for one head's panel of queries and the present key tile.
class PanelRule {
 public:
  static constexpr bool kChangesWeights = true;  // or may

  // bias_sums: [2 * bias_reach - 1] to which the bias's gradient is added, or null.
  PanelRule(const SpattnScoreRule& rule, const RuleScratch& scratch, int64_t head, int h,
            const QTile& tile, int panel, const KeyTile& keys, double* bias_sums)
      : rule_(rule), scratch_(scratch), keys_(keys), bias_sums_(bias_sums) {
    if (rule.alibi_slopes) slope_ = rule.alibi_slopes[head] * kLog2E;
    if (rule.relative_bias) {
      bias_ = rule.relative_bias + (rule.bias_heads == 1 ? 0 : head) * (2 * rule.bias_reach - 1);
    }
    const int64_t* rows = tile.rows + panel * kPanel;
    for (int i = 0; i < kPanel; ++i) {
      // A position without a row is at the end of the tile; its scores are used by nobody.
      q_rows_[i] = (rows[i] < 0 ? rows[0] + i : rows[i]) + rule.q_offset;
      q_rows_as_floats_[i] = static_cast<float>(q_rows_[i]);
      are_consecutive_ &= q_rows_[i] == q_rows_[0] + i;
    }
    const int64_t first = h * kTileQ + panel * kPanel;
    multipliers_ = scratch.multipliers + first;
    addends_ = scratch.addends + first;
    threshold_ = DropoutThreshold(rule.dropout_rate);
    kept_times_ = 1.0f / (1.0f - rule.dropout_rate);
  }

  // s = softmax_scale_log2 * k q becomes the scores under the rule, in base 2 as well, -inf where not
  // attended; returns each query's largest. With kDerive it keeps what ScoreGradient needs.
  template <bool kDerive>
  SPATTN_STAGE RegisterTile<1> Apply(KeyRange read, const uint32_t* attends, float* s) const {
    RegisterTile<1> largest;
    for (Vec& max : largest.v[0]) max = Vec{} - kInf;
    const float cap = rule_.logit_softcap * kLog2E, inverse_cap = cap == 0 ? 0 : 1 / cap;
    for (int j = read.begin; j < read.end; ++j) {
      for (int n = 0; n < kPanelVecs; ++n) {
        const int at = j * kPanel + n * kLanes;
        const IntVec attended = LanesOfBits(attends[j] >> (n * kLanes));
        Vec x = Load(s + at);
        if (cap != 0) {
          const Vec tanh = Tanh(x * inverse_cap);
          if (kDerive) Store(scratch_.cap_slopes + at, Select(attended, 1.0f - tanh * tanh, Vec{}));
          x = tanh * cap;
        }
        if (rule_.alibi_slopes) x -= slope_ * Distance(j, n);
        if (bias_) x += Bias(j, n) * kLog2E;
        x = Select(attended, x, Vec{} - kInf);
        largest.v[0][n] = Max(x, largest.v[0][n]);
        Store(s + at, x);
      }
    }
    return largest;
  }

  // Whether Apply has anything to do: who may attend is in the keys' bits already.
  bool ChangesScores() const {
    return rule_.logit_softcap != 0 || rule_.alibi_slopes || rule_.relative_bias;
  }

  // Weights of key j, or gradients of weights: 0 where dropped, larger where kept.
  SPATTN_INLINE Vec Drop(Vec x, int j, int n) const {
    if (rule_.dropout_rate == 0) return x;
    const BitVec bits = LoadAs<BitVec>(multipliers_ + n * kLanes) * scratch_.key_bits[j] +
                        LoadAs<BitVec>(addends_ + n * kLanes);
    return Select((IntVec)(bits >= threshold_), x * kept_times_, Vec{});
  }

  // From the gradient of the final scores of key j to that of softmax_scale q k; adds the bias's.
  SPATTN_INLINE Vec ScoreGradient(Vec ds, int j, int n) const {
    if (bias_sums_) AddBiasGradient(ds, j, n);
    if (rule_.logit_softcap == 0) return ds;
    return ds * Load(scratch_.cap_slopes + j * kPanel + n * kLanes);
  }

 private:
  // |i - j|, exact below 2^24.
  SPATTN_INLINE Vec Distance(int j, int n) const {
    const Vec apart = Load(q_rows_as_floats_ + n * kLanes) - static_cast<float>(keys_.rows[j]);
    return Select(apart < 0.0f, -apart, apart);
  }

  // Where lane i of vector n has its bias: clip(i - j, 1 - R, R - 1) + R - 1.
  SPATTN_INLINE int64_t BiasIndex(int j, int i) const {
    const int64_t last = 2 * rule_.bias_reach - 2;
    return Max(0, Min(q_rows_[i] - keys_.rows[j] + rule_.bias_reach - 1, last));
  }

  SPATTN_INLINE Vec Bias(int j, int n) const {
    const int64_t first = BiasIndex(j, n * kLanes), last = BiasIndex(j, (n + 1) * kLanes - 1);
    if (are_consecutive_ && first == last) return Broadcast(bias_[first]);
    if (are_consecutive_ && last - first == kLanes - 1) return Load(bias_ + first);
    Vec bias;
    for (int i = 0; i < kLanes; ++i) bias[i] = bias_[BiasIndex(j, n * kLanes + i)];
    return bias;
  }

  SPATTN_INLINE void AddBiasGradient(Vec ds, int j, int n) const {
    const int64_t first = BiasIndex(j, n * kLanes), last = BiasIndex(j, (n + 1) * kLanes - 1);
    if (are_consecutive_ && last - first == kLanes - 1) {
      for (int i = 0; i < kLanes; ++i) bias_sums_[first + i] += ds[i];
    } else if (are_consecutive_ && first == last) {
      float sum = 0;
      for (int i = 0; i < kLanes; ++i) sum += ds[i];
      bias_sums_[first] += sum;
    } else {
      for (int i = 0; i < kLanes; ++i) bias_sums_[BiasIndex(j, n * kLanes + i)] += ds[i];
    }
  }

  const SpattnScoreRule& rule_;
  const RuleScratch& scratch_;
  const KeyTile& keys_;
  double* const bias_sums_;
  const float* bias_ = nullptr;
  float slope_ = 0;  // in base 2
  int64_t q_rows_[kPanel];
  float q_rows_as_floats_[kPanel];
  bool are_consecutive_ = true;
  const uint32_t *multipliers_, *addends_;
  uint32_t threshold_;
  float kept_times_;
};

// In its place where there is no rule.
struct NoRule {
  static constexpr bool kChangesWeights = false;
  SPATTN_INLINE Vec Drop(Vec x, int, int) const { return x; }
  SPATTN_INLINE Vec ScoreGradient(Vec ds, int, int) const { return ds; }
};

}  // namespace SPATTN_ISA
}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_SCORE_RULE_H_
