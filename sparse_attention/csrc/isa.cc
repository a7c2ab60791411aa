// isa.cc — asks the CPU what it has, once.
#include "isa.h"

#include <stdlib.h>
#include <string.h>
#if !defined(SPATTN_ONLY_BASELINE)
#include <cpuid.h>
#endif

#include "core.h"

namespace spattn {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};  // in Isa's order

Isa BestIsa() {
#if !defined(SPATTN_ONLY_BASELINE)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  unsigned eax = 0, ebx, ecx, edx;  // GCC 9 does not know the name of avx512_bf16
  const bool has_bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
  return has_bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
#else
  return Isa::kBaseline;
#endif
}

Isa Lowered(Isa best) {
  const char* wanted = getenv("SPARSE_ATTENTION_ISA");
  for (int isa = 0; wanted && isa < static_cast<int>(best); ++isa) {
    if (strcmp(wanted, kNames[isa]) == 0) return static_cast<Isa>(isa);
  }
  return best;
}

}  // namespace

Isa CpuIsa() {
  static const Isa isa = Lowered(BestIsa());
  return isa;
}

}  // namespace spattn

const char* spattn_cpu_isa(void) { return spattn::kNames[static_cast<int>(spattn::CpuIsa())]; }
