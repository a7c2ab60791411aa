// isa.cc — asks the CPU what it has, once.
#include "isa.h"

#include <stdlib.h>
#include <string.h>

#include "core.h"

namespace spattn {
namespace {

Isa BestIsa() {
#if !defined(SPATTN_ONLY_BASELINE)
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx2) return has_avx512 ? Isa::kAvx512 : Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa Lowered(Isa best) {
  const char* wanted = getenv("SPARSE_ATTENTION_ISA");
  if (wanted && strcmp(wanted, "baseline") == 0) return Isa::kBaseline;
  if (wanted && strcmp(wanted, "avx2") == 0 && best == Isa::kAvx512) return Isa::kAvx2;
  return best;
}

}  // namespace

Isa CpuIsa() {
  static const Isa isa = Lowered(BestIsa());
  return isa;
}

}  // namespace spattn

const char* spattn_cpu_isa(void) {
  switch (spattn::CpuIsa()) {
    case spattn::Isa::kAvx512:
      return "avx512";
    case spattn::Isa::kAvx2:
      return "avx2";
    default:
      return "baseline";
  }
}
