#include "cache/wide_reads.h"

#include "base/cpu.h"

#if defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define PENSTOCK_TSAN 1
#endif
#endif
#if defined(__SANITIZE_THREAD__)
#define PENSTOCK_TSAN 1
#endif

namespace penstock {

const WideReads* wide_reads() {
#if defined(__x86_64__) && !defined(PENSTOCK_TSAN)
  switch (cpu_level()) {
    case CpuLevel::kAvx512:
      return &kWideReadsAvx512;
    case CpuLevel::kAvx2:
      return &kWideReadsAvx2;
    case CpuLevel::kPortable:
      break;
  }
#endif
  return nullptr;
}

}  // namespace penstock
