// isa.cc — asks the CPU once which instruction sets it has.
#include "cpu/isa.h"

#include <stdlib.h>
#include <string.h>
#if !defined(SPATTN_ONLY_BASELINE)
#include <cpuid.h>
#endif

#include "abi/core.h"

namespace spattn {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};  // in Isa's order

#if defined(SPATTN_ONLY_BASELINE)
Isa Supported() { return Isa::kBaseline; }
Isa Preferred() { return Isa::kBaseline; }
#else
Isa Supported() {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Isa::kBaseline;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  unsigned eax = 0, ebx, ecx, edx;  // GCC 9 does not know the name of avx512_bf16
  const bool has_bf16 = __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
  return has_bf16 ? Isa::kAvx512Bf16 : Isa::kAvx512;
}

// dpbf16ps pays on AMD's cores, where bfloat16 products reach twice the rate of float32 ones. Intel's
// take longer over it than over two float32 products: `all` in bfloat16 101 ms, not 62 (Xeon with AMX).
Isa Preferred() {
  const Isa isa = Supported();
  return isa == Isa::kAvx512Bf16 && !__builtin_cpu_is("amd") ? Isa::kAvx512 : isa;
}
#endif

Isa Chosen() {
  const char* wanted = getenv("SPARSE_ATTENTION_ISA");
  for (int isa = 0; wanted && isa <= static_cast<int>(Supported()); ++isa) {
    if (strcmp(wanted, kNames[isa]) == 0) return static_cast<Isa>(isa);
  }
  return Preferred();
}

}  // namespace

Isa CpuIsa() {
  static const Isa isa = Chosen();
  return isa;
}

}  // namespace spattn

const char* spattn_cpu_isa(void) { return spattn::kNames[static_cast<int>(spattn::CpuIsa())]; }
