// Compiled for the baseline, unlike the kernels: it runs on any CPU.
#include "ssiuu/cpu_features.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace ssiuu::cpu {
namespace {

#if defined(__x86_64__)
enum Register { kEax, kEbx, kEcx, kEdx };

bool cpuid(unsigned leaf, unsigned subleaf, Register index, int bit) {
  unsigned r[4] = {};
  return __get_cpuid_count(leaf, subleaf, &r[kEax], &r[kEbx], &r[kEcx], &r[kEdx]) != 0 && (r[index] >> bit & 1) != 0;
}
#elif defined(__aarch64__) && defined(__linux__)
bool hwcap(unsigned long mask) { return (getauxval(AT_HWCAP) & mask) != 0; }
bool hwcap2(unsigned long mask) { return (getauxval(AT_HWCAP2) & mask) != 0; }
#elif defined(__aarch64__)
// macOS: its compiler's default, which is what it takes for "native", runs on every CPU of Apple's.
bool hwcap(unsigned long) { return true; }
bool hwcap2(unsigned long) { return true; }
#endif

// Calls function(name, whether compiled, whether present).
template <class Function>
void for_each_feature([[maybe_unused]] Function&& function) {
  [[maybe_unused]] const bool* compiled = kCompiledFeatures;
#define SSIUU_VISIT(macro, name, present) function(name, *compiled++, (present) != 0);
  SSIUU_CPU_FEATURES(SSIUU_VISIT)
#undef SSIUU_VISIT
}

void append(std::string& names, const char* name) {
  if (!names.empty()) names += ' ';
  names += name;
}

}  // namespace

std::string compiled_features() {
  std::string names;
  for_each_feature([&](const char* name, bool compiled, bool) {
    if (compiled) append(names, name);
  });
  return names;
}

std::string missing_features() {
  std::string names;
  for_each_feature([&](const char* name, bool compiled, bool present) {
    if (compiled && !present) append(names, name);
  });
  return names;
}

}  // namespace ssiuu::cpu
