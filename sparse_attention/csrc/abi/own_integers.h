// own_integers.h — a call's own copy of the integers that say where it reads and writes.
//
// A plan or a table that TensorFlow hands over is memory that another op may be writing: a variable,
// say. A call on the CPU checks every value before it uses any, so its caller copies them first, and
// both the checks and the kernels read the copy. On a GPU each kernel guards what it reads itself.
#ifndef SPARSE_ATTENTION_ABI_OWN_INTEGERS_H_
#define SPARSE_ATTENTION_ABI_OWN_INTEGERS_H_

#include <string.h>

#include "abi/blocksparse.h"
#include "abi/core.h"

namespace spattn {

// Calls visit(&array, length) for each of them. Sizes are those of arrays that exist.
template <class Visit>
void ForIntegers(SpattnProblem* problem, SpattnPlan* plan, const Visit& visit) {
  visit(&problem->kv_lengths, problem->kv_lengths ? problem->batch : 0);
  visit(&plan->kv_indptr, plan->heads * plan->q_tiles + 1);
  visit(&plan->kv_indices, plan->entries);
  visit(&plan->mask_ids, plan->entries);
}

template <class Visit>
void ForIntegers(SpattnFwdParams* params, const Visit& visit) {
  ForIntegers(&params->problem, &params->plan, visit);
}

template <class Visit>
void ForIntegers(SpattnBwdParams* params, const Visit& visit) {
  ForIntegers(&params->problem, &params->plan, visit);
}

template <class Params, class Visit>  // the three-op family's, which have a table each
void ForIntegers(Params* params, const Visit& visit) {
  visit(&params->lut.data, params->lut.heads * params->lut.entries * 2);
}

template <class Params>
int64_t CountIntegers(Params params) {
  int64_t count = 0;
  ForIntegers(&params, [&](const int32_t**, int64_t length) { count += length; });
  return count;
}

// Copies them to `to` [CountIntegers(*params)] and points the params there.
template <class Params>
void OwnIntegers(Params* params, int32_t* to) {
  ForIntegers(params, [&](const int32_t** array, int64_t length) {
    if (length == 0) return;
    memcpy(to, *array, length * sizeof(int32_t));
    *array = to;
    to += length;
  });
}

}  // namespace spattn

#endif  // SPARSE_ATTENTION_ABI_OWN_INTEGERS_H_
