// A fresh allocation costs a page fault for each 4 KB that is written for the first time, which for a large
// glu_backward is most of its time (benchmarks/NOTES.md, log).
#pragma once

#include <cstdint>

namespace ssiuu::cpu {

// Asks for huge pages where nothing has been written yet; without effect elsewhere.
void advise_huge_pages(void* begin, int64_t bytes);

}  // namespace ssiuu::cpu
