// rule.cc — checks a score rule, lays out its workspace and launches what prepares it.
#include "cuda/host/rule.h"

#include <stdlib.h>

#include <algorithm>
#include <cmath>

#include "abi/checks.h"
#include "abi/score_rule.h"
#include "cuda/host/configs.h"

namespace spattn {
namespace {

constexpr int kThreads = 256;  // of a CTA of the kernels score_rule_*

// CTAs that add up the gradient of relative_bias: two for each multiprocessor of an H100.
constexpr int64_t kSumCtas = 264;

// i + q_offset - j is an int in the kernels.
constexpr int64_t kMaxRuleLen = int64_t{1} << 30;

SpattnStatus CheckRuleLimits(const SpattnProblem& p, const SpattnScoreRule& rule) {
  for (const auto& [name, size] :
       {Named{"q_len", p.q_len}, Named{"kv_len", p.kv_len}, Named{"q_offset", rule.q_offset},
        Named{"-q_offset", -rule.q_offset}, Named{"the reach of relative_bias", rule.bias_reach}}) {
    SPATTN_RETURN_IF(size > kMaxRuleLen, "%s must be at most 2^30 on a GPU, got %lld", name,
                     (LongLong)size);
  }
  return Ok();
}

// Whether a mask is the same for all heads and queries.
bool IsOfKeys(const SpattnProblem& p, const int64_t (&strides)[4]) {
  return (strides[1] == 0 || p.heads == 1) && (strides[2] == 0 || p.q_len == 1);
}

int PartsOf(const SpattnProblem& p, const SpattnScoreRule& rule) {
  const bool masks_keys = rule.mask && IsOfKeys(p, rule.mask_strides);
  int parts = 0;
  if (rule.logit_softcap != 0) parts |= SPATTN_RULE_SOFTCAP;
  if (rule.alibi_slopes) parts |= SPATTN_RULE_ALIBI;
  if (rule.relative_bias) parts |= SPATTN_RULE_BIAS;
  if (rule.q_segments || masks_keys) parts |= SPATTN_RULE_SEGMENTS;
  if (rule.mask && !masks_keys) parts |= SPATTN_RULE_MASK;
  if (rule.dropout_rate != 0) parts |= SPATTN_RULE_DROPOUT;
  return parts;
}

// Words are read two at a time, and row 0's also where there is no row.
int32_t PitchOf(int64_t rows) {
  return static_cast<int32_t>(std::max<int64_t>((rows + 1) / 2 * 2, 2));
}

// What SpattnCudaRule says of tanh(t x), t = softmax_scale / logit_softcap. Of |t x| < 1/2, with an
// absolute error below 1.3e-7: tanh(y) / y as a polynomial of y^2 - 1/4, minimax in the error of tanh(y).
void SetCapTerms(float softmax_scale, float cap, SpattnCudaRule* rule) {
  constexpr double kTerms[] = {0.9242340591277163, -0.2756131644828143, 0.09892209482241934,
                               -0.04337248097900576};
  constexpr double kLargest = 1 << 18, kLeast = 1.0 / (1 << 13), kLog2e = 1.4426950408889634;
  const double t = softmax_scale / static_cast<double>(cap), square = t * t;
  double terms[4] = {}, cap_square = 0;
  // A cap far above all scores, for which an error of 1.3e-7 of it is too much: tanh(y) = y - y^3 / 3 of
  // |y| < 0.022, exact to 3e-8 of itself, and of |x| < 2^20, or t^3 would leave float32's range.
  if (std::abs(t) < kLeast) {
    cap_square = std::min(0.022 * 0.022 / square, std::ldexp(1, 40));
    terms[0] = t - t * square * cap_square / 3, terms[1] = -t * square / 3;
  }
  // Above, too, terms would leave that range; no logit is small there.
  if (std::abs(t) >= kLeast && std::abs(t) < kLargest) {
    cap_square = 0.25 / square;
    double power = t;
    for (int i = 0; i < 4; ++i, power *= square) terms[i] = kTerms[i] * power;
  }
  rule->cap_square = static_cast<float>(cap_square);
  for (int i = 0; i < 4; ++i) {
    rule->cap_terms[i] = static_cast<float>(terms[i]);
    rule->cap_exponents[i] = static_cast<float>(terms[i] * (cap * kLog2e));
  }
}

}  // namespace

SpattnStatus RuleOnDevice::Init(const SpattnProblem& problem, const SpattnScoreRule& rule,
                                const SpattnPlan& by_q, const SpattnKvPlan* by_kv,
                                float* drelative_bias, DeviceArena* arena) {
  SPATTN_RETURN_IF_ERROR(CheckRule(problem, rule));
  if (!HasRule(rule)) return Ok();
  SPATTN_RETURN_IF_ERROR(CheckRuleLimits(problem, rule));
  problem_ = problem;
  parts_ = PartsOf(problem, rule);
  rule_.kept_times = 1;
  rule_.logit_softcap = rule.logit_softcap;
  if (rule.logit_softcap != 0) SetCapTerms(problem.softmax_scale, rule.logit_softcap, &rule_);
  rule_.q_offset = static_cast<int32_t>(rule.q_offset);
  rule_.alibi_slopes = rule.alibi_slopes;
  rule_.relative_bias = rule.relative_bias;
  rule_.bias_heads = static_cast<int32_t>(rule.bias_heads);
  rule_.bias_reach = static_cast<int32_t>(rule.bias_reach);
  rule_.q_segments = rule.q_segments;
  rule_.kv_segments = rule.kv_segments;
  rule_.mask = rule.mask;
  for (int i = 0; i < 4; ++i) rule_.mask_strides[i] = rule.mask_strides[i];
  const int64_t* strides = rule.mask_strides;
  rule_.mask_is_aligned = strides[3] == 1 && problem.kv_len % 16 == 0 && IsAligned(rule.mask, 16) &&
                          (strides[0] | strides[1] | strides[2]) % 16 == 0;
  if (rule.mask && !(parts_ & SPATTN_RULE_MASK)) {
    rule_.kv_mask = rule.mask;
    rule_.kv_mask_strides[0] = rule.mask_strides[0];
    rule_.kv_mask_strides[1] = rule.mask_strides[3];
  }
  if (parts_ & SPATTN_RULE_DROPOUT) {
    dropout_seed_ = rule.dropout_seed;
    rule_.dropout_threshold = DropoutThreshold(rule.dropout_rate);
    rule_.kept_times = 1 / (1 - rule.dropout_rate);
    rule_.query_pitch = PitchOf(problem.q_len);
    rule_.key_pitch = PitchOf(problem.kv_len);
    const int64_t heads = problem.batch * problem.heads;
    rule_.query_words = arena->Take<uint32_t>(heads * rule_.query_pitch * 2);
    rule_.key_words = arena->Take<uint32_t>(heads * rule_.key_pitch);
  }
  if (drelative_bias != nullptr && rule.relative_bias != nullptr) {
    parts_ |= SPATTN_RULE_BIAS_SUMS;
    drelative_bias_ = drelative_bias;
    const int64_t tiles = CountTiles(problem.q_len, problem.row_stride, by_q.tile_q);
    const int64_t farthest = std::max(problem.q_len, problem.kv_len) + std::abs(rule.q_offset);
    rule_.sum_reach = static_cast<int32_t>(std::min(rule.bias_reach, farthest + 2));
    rule_.slices = static_cast<int32_t>(std::max<int64_t>(
        std::min<int64_t>(tiles * problem.batch, (kSumCtas + problem.heads - 1) / problem.heads),
        1));
    rule_.bias_sums = arena->Take<float>(int64_t{rule_.slices} * problem.heads *
                                         (2 * int64_t{rule_.sum_reach} - 1));
  }
  if (LeavesLists()) {
    const auto take = [&](int64_t entries, int64_t lists, int32_t block_size, int32_t tile) {
      const int64_t all = problem.batch * entries;
      int32_t *indices = arena->Take<int32_t>(all), *mask_ids = arena->Take<int32_t>(all);
      return Lists{indices, mask_ids, arena->Take<int32_t>(problem.batch * lists), block_size,
                   tile};
    };
    kv_blocks_ = static_cast<int32_t>(by_q.kv_blocks);
    q_blocks_ = static_cast<int32_t>(
        by_kv != nullptr ? by_kv->q_blocks
                         : CountTiles(problem.q_len, problem.row_stride, by_q.block_size));
    if (parts_ & SPATTN_RULE_MASK) {
      // One mask for all sequences, of one length. The workspace has room for all: while XLA compiles,
      // kv_lengths is null, whether or not the call has lengths.
      const bool is_shared = rule.mask_strides[0] == 0 && problem.kv_lengths == nullptr;
      pairs_batch_ = is_shared ? 1 : problem.batch;
      rule_.pair_kinds = arena->Take<uint8_t>(problem.batch * q_blocks_ * int64_t{kv_blocks_});
    }
    rule_.kv_ranges = arena->Take<int32_t>(2 * problem.batch * kv_blocks_);
    by_q_ = take(by_q.entries, by_q.heads * by_q.q_tiles, by_q.block_size, by_q.tile_q);
    rule_.q_tile_ends = by_q_.ends;
    if (by_kv != nullptr) {
      SPATTN_RETURN_IF(by_kv->block_size != by_q.block_size,
                       "both plans must have one block_size, got %d and %d", by_q.block_size,
                       by_kv->block_size);
      rule_.q_ranges = arena->Take<int32_t>(2 * problem.batch * q_blocks_);
      by_kv_ =
          take(by_kv->entries, by_kv->heads * by_kv->kv_tiles, by_kv->block_size, by_kv->tile_kv);
      rule_.kv_tile_ends = by_kv_.ends;
    }
  }
  return Ok();
}

template <class Params>
SpattnStatus RuleOnDevice::Launch(const Stream& stream, int phase, const Params& params,
                                  int64_t threads) const {
  SpattnCudaShape shape = {};
  shape.arch = stream.arch();
  shape.is_row_strided = problem_.row_stride > 1;
  const auto configure = [](const SpattnCudaShape& shape, int phase, SpattnCudaKernel* kernel) {
    *kernel = Configure(shape, static_cast<SpattnPhase>(phase));
    return Ok();
  };
  const LoadedKernel* kernel;
  SPATTN_RETURN_IF_ERROR(stream.Find<SpattnCudaShape>(shape, phase, configure, &kernel));
  const int64_t ctas = (threads + kThreads - 1) / kThreads;
  SPATTN_RETURN_IF(ctas > kMaxGridX,
                   "a score rule needs too many threads for a GPU to prepare it: %lld",
                   (LongLong)threads);
  return stream.Launch(*kernel, &params, ctas, 1, 1);
}

SpattnStatus RuleOnDevice::LeaveLists(const Stream& stream, const Lists& lists,
                                      SpattnTilePlan* plan) const {
  const SpattnCudaRuleListsParams params = {problem_,
                                            rule_,
                                            *plan,
                                            &lists == &by_kv_,
                                            lists.block_size,
                                            lists.tile,
                                            q_blocks_,
                                            kv_blocks_,
                                            static_cast<int32_t>(pairs_batch_),
                                            lists.indices,
                                            lists.mask_ids,
                                            lists.ends};
  plan->indices = lists.indices;
  plan->mask_ids = lists.mask_ids;
  return Launch(stream, SPATTN_RULE_LISTS, params,
                problem_.batch * plan->heads * plan->tiles * int64_t{32});
}

SpattnStatus RuleOnDevice::Prepare(const Stream& stream, SpattnTilePlan* by_q,
                                   SpattnTilePlan* by_kv) {
  if (parts_ & SPATTN_RULE_DROPOUT) {
    const SpattnCudaRuleWordsParams params = {problem_, rule_, dropout_seed_};
    const int64_t rows = rule_.query_pitch + int64_t{rule_.key_pitch};
    SPATTN_RETURN_IF_ERROR(
        Launch(stream, SPATTN_RULE_WORDS, params, problem_.batch * problem_.heads * rows));
  }
  if (!LeavesLists()) return Ok();
  // The forward pass asks for no blocks of queries.
  const int32_t ranges_of_q = rule_.q_ranges == nullptr ? 0 : q_blocks_;
  const SpattnCudaRuleRangesParams ranges = {problem_, rule_, by_q_.block_size, ranges_of_q,
                                             kv_blocks_};
  SPATTN_RETURN_IF_ERROR(Launch(stream, SPATTN_RULE_RANGES, ranges,
                                problem_.batch * (ranges_of_q + int64_t{kv_blocks_}) * 32));
  if (parts_ & SPATTN_RULE_MASK) {
    const SpattnCudaRulePairsParams pairs = {problem_,         rule_,
                                             by_q_.block_size, q_blocks_,
                                             kv_blocks_,       static_cast<int32_t>(pairs_batch_)};
    SPATTN_RETURN_IF_ERROR(Launch(stream, SPATTN_RULE_PAIRS, pairs,
                                  pairs_batch_ * q_blocks_ * int64_t{kv_blocks_} * 32));
  }
  if (by_q != nullptr) SPATTN_RETURN_IF_ERROR(LeaveLists(stream, by_q_, by_q));
  return by_kv == nullptr ? Ok() : LeaveLists(stream, by_kv_, by_kv);
}

SpattnStatus RuleOnDevice::SumSlices(const Stream& stream) const {
  if (drelative_bias_ == nullptr) return Ok();
  const SpattnCudaRuleBiasParams params = {problem_, rule_, drelative_bias_};
  return Launch(stream, SPATTN_RULE_BIAS_GRADIENT, params,
                rule_.bias_heads * (2 * int64_t{rule_.bias_reach} - 1));
}

}  // namespace spattn
