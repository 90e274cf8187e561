#include "base/cpu.h"

#include <algorithm>
#include <atomic>

namespace penstock {
namespace {

CpuLevel detect() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // The levels are those of -march=x86-64-v3 and v4, which the *_avx2.cc and *_avx512.cc sources are built
  // for.
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                  __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                  __builtin_cpu_supports("avx512cd");
  if (v4) return CpuLevel::kAvx512;
  if (v3) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kPortable;
}

// Written by force_cpu_level, read by cpu_level; relaxed, since nothing else is published through it.
std::atomic<CpuLevel>& level_in_force() {
  static std::atomic<CpuLevel> level{detected_cpu_level()};
  return level;
}

}  // namespace

CpuLevel detected_cpu_level() {
  static const CpuLevel level = detect();
  return level;
}

CpuLevel cpu_level() {
  return level_in_force().load(std::memory_order_relaxed);
}

CpuLevel force_cpu_level(CpuLevel level) {
  level = std::min(level, detected_cpu_level());
  level_in_force().store(level, std::memory_order_relaxed);
  return level;
}

}  // namespace penstock
