#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssiuu::cpu {

void advise_huge_pages([[maybe_unused]] void* begin, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 1 << 12;
  // glibc never gives back to the system, between two uses, what is smaller than this. On recycled memory the advice
  // only sends the kernel to look for huge pages, at every call.
  constexpr int64_t kAlwaysFresh = int64_t{32} << 20;
  if (bytes < kAlwaysFresh) return;
  const auto address = reinterpret_cast<uintptr_t>(begin);
  const uintptr_t first = (address + kPage - 1) / kPage * kPage;
  const uintptr_t last = (address + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // it may fail: it is advice
#endif
}

}  // namespace ssiuu::cpu
