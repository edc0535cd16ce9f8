// Instruction set extensions: those that the CPU kernels were compiled to use, and those of them that this CPU lacks.
#pragma once

#include <string>

namespace ssiuu::cpu {

// X(macro that the compiler defines, name, whether this CPU has it) for every extension that compilers use unasked in
// code like the kernels'. __builtin_cpu_supports also asks whether the system saves the registers; the helpers of
// cpu_features.cpp are for names that older compilers do not know.
#if defined(__x86_64__)
#define SSIUU_CPU_FEATURES(X)                                                          \
  X(__SSE3__, "sse3", __builtin_cpu_supports("sse3"))                                  \
  X(__SSSE3__, "ssse3", __builtin_cpu_supports("ssse3"))                               \
  X(__SSE4_1__, "sse4.1", __builtin_cpu_supports("sse4.1"))                            \
  X(__SSE4_2__, "sse4.2", __builtin_cpu_supports("sse4.2"))                            \
  X(__POPCNT__, "popcnt", __builtin_cpu_supports("popcnt"))                            \
  X(__MOVBE__, "movbe", cpuid(0x1, 0, kEcx, 22))                                       \
  X(__LZCNT__, "lzcnt", cpuid(0x80000001, 0, kEcx, 5))                                 \
  X(__TBM__, "tbm", cpuid(0x80000001, 0, kEcx, 21))                                    \
  X(__BMI__, "bmi", __builtin_cpu_supports("bmi"))                                     \
  X(__BMI2__, "bmi2", __builtin_cpu_supports("bmi2"))                                  \
  X(__AVX__, "avx", __builtin_cpu_supports("avx"))                                     \
  X(__F16C__, "f16c", cpuid(0x1, 0, kEcx, 29))                                         \
  X(__FMA__, "fma", __builtin_cpu_supports("fma"))                                     \
  X(__FMA4__, "fma4", __builtin_cpu_supports("fma4"))                                  \
  X(__XOP__, "xop", __builtin_cpu_supports("xop"))                                     \
  X(__AVX2__, "avx2", __builtin_cpu_supports("avx2"))                                  \
  X(__GFNI__, "gfni", __builtin_cpu_supports("gfni"))                                  \
  X(__AVX512F__, "avx512f", __builtin_cpu_supports("avx512f"))                         \
  X(__AVX512CD__, "avx512cd", __builtin_cpu_supports("avx512cd"))                      \
  X(__AVX512DQ__, "avx512dq", __builtin_cpu_supports("avx512dq"))                      \
  X(__AVX512BW__, "avx512bw", __builtin_cpu_supports("avx512bw"))                      \
  X(__AVX512VL__, "avx512vl", __builtin_cpu_supports("avx512vl"))                      \
  X(__AVX512VBMI__, "avx512vbmi", __builtin_cpu_supports("avx512vbmi"))                \
  X(__AVX512VBMI2__, "avx512vbmi2", __builtin_cpu_supports("avx512vbmi2"))             \
  X(__AVX512VNNI__, "avx512vnni", __builtin_cpu_supports("avx512vnni"))                \
  X(__AVX512BITALG__, "avx512bitalg", __builtin_cpu_supports("avx512bitalg"))          \
  X(__AVX512VPOPCNTDQ__, "avx512vpopcntdq", __builtin_cpu_supports("avx512vpopcntdq")) \
  X(__APX_F__, "apx_f", cpuid(0x7, 1, kEdx, 21))
#elif defined(__aarch64__)
#define SSIUU_CPU_FEATURES(X)                                    \
  X(__ARM_FEATURE_ATOMICS, "lse", hwcap(1 << 8))                 \
  X(__ARM_FEATURE_FP16_SCALAR_ARITHMETIC, "fp16", hwcap(1 << 9)) \
  X(__ARM_FEATURE_RCPC, "rcpc", hwcap(1 << 15))                  \
  X(__ARM_FEATURE_DOTPROD, "dotprod", hwcap(1 << 20))            \
  X(__ARM_FEATURE_SVE, "sve", hwcap(1 << 22))                    \
  X(__ARM_FEATURE_SVE2, "sve2", hwcap2(1 << 1))                  \
  X(__ARM_FEATURE_MATMUL_INT8, "i8mm", hwcap2(1 << 13))          \
  X(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC, "bf16", hwcap2(1 << 14))
#else
#define SSIUU_CPU_FEATURES(X)
#endif

// In the table's order, ended by false. Data, not a function: it can be read on a CPU that cannot run the code compiled
// beside it.
extern const bool kCompiledFeatures[];

// Names in the table's order, separated by spaces.
std::string compiled_features();
std::string missing_features();

}  // namespace ssiuu::cpu
