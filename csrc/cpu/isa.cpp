// Compiled with the flags of the kernels, of which it makes the record.
#include "ssiuu/cpu_features.h"

namespace ssiuu::cpu {

// The text of a macro that is defined is its value, a number; of one that is not, its name.
#define SSIUU_TEXT(macro) #macro
#define SSIUU_COMPILED(macro, name, present) SSIUU_TEXT(macro)[0] != '_',

const bool kCompiledFeatures[] = {SSIUU_CPU_FEATURES(SSIUU_COMPILED) false};

}  // namespace ssiuu::cpu
