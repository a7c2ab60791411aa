// isa.h — which of the instruction sets that the kernels are compiled for this CPU uses.
#ifndef SPARSE_ATTENTION_CPU_ISA_H_
#define SPARSE_ATTENTION_CPU_ISA_H_

namespace spattn {

enum class Isa { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The fastest one, or the one that SPARSE_ATTENTION_ISA in the environment names, if the CPU has it.
Isa CpuIsa();

// The instruction set's own `name`: each file in cpu/ is compiled once in each of the namespaces.
#if defined(SPATTN_ONLY_BASELINE)
#define SPATTN_OF_THIS_ISA(name) (::spattn::baseline::name)
#else
#define SPATTN_OF_THIS_ISA(name)                                                  \
  (::spattn::CpuIsa() == ::spattn::Isa::kAvx512Bf16 ? ::spattn::avx512_bf16::name \
   : ::spattn::CpuIsa() == ::spattn::Isa::kAvx512   ? ::spattn::avx512::name      \
   : ::spattn::CpuIsa() == ::spattn::Isa::kAvx2     ? ::spattn::avx2::name        \
                                                    : ::spattn::baseline::name)
#endif

}  // namespace spattn

#endif  // SPARSE_ATTENTION_CPU_ISA_H_
