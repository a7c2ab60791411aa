// score_rule.h — functions of a SpattnScoreRule that every device has: whether there is one, and dropout.
//
// Which weights dropout keeps is a function of (seed, batch, head, query row, key row):
//
//   (c0, c1, s0, s1) = Philox(counter = (seed[1] low, seed[1] high, batch, head), key = seed[0])
//   (a_i, b_i, ., .) = Philox(counter = (i, 0, c0, c1), key = (s0, s1))         of query row i
//   (g_j, ., ., .)   = Philox(counter = (j, 1, c0, c1), key = (s0, s1))         of key row j
//   bits_ij = (a_i | 1) * g_j + b_i mod 2^32       kept where bits_ij >= dropout_rate * 2^32
//
// Philox is Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). A
// generator's call for every weight would cost more than the attention does: 40 multiplications, and
// four weights that share a call never lie together both where queries are a tile's rows and where
// keys are. So it is called once for each row, and one multiplication and addition joins two rows:
// bits of one query are independent and uniform, as g_j are and a_i | 1 is odd; so are those of one
// key; those of two queries at two keys are as good as (a, b) are random, which a test looks at.
// Every device and every tile computes the same bits.
#ifndef SPARSE_ATTENTION_ABI_SCORE_RULE_H_
#define SPARSE_ATTENTION_ABI_SCORE_RULE_H_

#include <stdint.h>

#include "abi/core.h"

namespace spattn {

// All functions here are static: the CPU's kernels are compiled for several instruction sets, and the
// linker must not take one's copy for another's.
#ifdef __CUDACC__
#define SPATTN_ANYWHERE __host__ __device__ static inline
#else
#define SPATTN_ANYWHERE static inline
#endif

// Whether anything stands between q kT and the softmax.
SPATTN_ANYWHERE bool HasRule(const SpattnScoreRule& rule) {
  return rule.logit_softcap != 0 || rule.dropout_rate != 0 || rule.alibi_slopes ||
         rule.relative_bias || rule.q_segments || rule.mask;
}

// ---- dropout ----

struct PhiloxWords {
  uint32_t w[4];
};

SPATTN_ANYWHERE PhiloxWords Philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t* w = counter.w;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t{0xD2511F53u} * w[0], second = uint64_t{0xCD9E8D57u} * w[2];
    w[0] = static_cast<uint32_t>(second >> 32) ^ w[1] ^ key0;
    w[2] = static_cast<uint32_t>(first >> 32) ^ w[3] ^ key1;
    w[1] = static_cast<uint32_t>(second);
    w[3] = static_cast<uint32_t>(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return counter;
}

// Of one batch element and head: c0, c1, s0, s1 above.
SPATTN_ANYWHERE PhiloxWords DropoutKey(const int64_t* seed, int64_t batch, int64_t head) {
  const uint64_t key = static_cast<uint64_t>(seed[0]), offset = static_cast<uint64_t>(seed[1]);
  const PhiloxWords counter = {{static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32),
                                static_cast<uint32_t>(batch), static_cast<uint32_t>(head)}};
  return Philox(counter, static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32));
}

struct DropoutQuery {
  uint32_t multiplier, addend;  // a_i | 1 and b_i
};

SPATTN_ANYWHERE DropoutQuery DropoutOfQuery(const PhiloxWords& key, int64_t i) {
  const PhiloxWords counter = {{static_cast<uint32_t>(i), 0, key.w[0], key.w[1]}};
  const PhiloxWords words = Philox(counter, key.w[2], key.w[3]);
  return {words.w[0] | 1, words.w[1]};
}

SPATTN_ANYWHERE uint32_t DropoutOfKey(const PhiloxWords& key, int64_t j) {
  const PhiloxWords counter = {{static_cast<uint32_t>(j), 1, key.w[0], key.w[1]}};
  return Philox(counter, key.w[2], key.w[3]).w[0];
}

// Weights whose bits are at least that are kept.
SPATTN_ANYWHERE uint32_t DropoutThreshold(float rate) {
  return static_cast<uint32_t>(static_cast<double>(rate) * 4294967296.0);
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_ABI_SCORE_RULE_H_
