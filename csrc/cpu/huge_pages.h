// A fresh allocation costs a page fault for each 4 KB that is written for the first time, two thirds of the time of
// glu_backward of 2048 x 8192 in float32.
#pragma once

#include <cstdint>

namespace ssiuu::cpu {

// Asks for huge pages where nothing has been written yet; without effect elsewhere.
void advise_huge_pages(void* begin, int64_t bytes);

}  // namespace ssiuu::cpu
