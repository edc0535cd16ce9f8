#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssiuu::cpu {

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 12;
  constexpr int64_t kHugePage = 1 << 21;
  if (bytes < 2 * kHugePage) return;  // what is smaller is recycled by the C library, and need not hold a whole one
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // it may fail: it is advice
#endif
}

}  // namespace ssiuu::cpu
