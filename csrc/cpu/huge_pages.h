// A fresh allocation costs a page fault for each 4 KB that is written for the first time: 32 of the 48 ms that each of
// two cores took for glu_backward of 2048 x 8192 in float32, in memory just taken from the system.
#pragma once

#include <cstdint>

namespace ssiuu::cpu {

// Asks for huge pages where nothing has been written yet; without effect elsewhere.
void advise_huge_pages(void* begin, int64_t bytes);

}  // namespace ssiuu::cpu
