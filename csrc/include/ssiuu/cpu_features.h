// Instruction set extensions that the CPU kernels were compiled to use.
#pragma once

namespace ssiuu::cpu {

// Names as __builtin_cpu_supports knows them, narrowest first, ended by null. Data, not a function: it can be read on a
// CPU that cannot run the code compiled beside it.
extern const char* const kCompiledFeatures[];

}  // namespace ssiuu::cpu
