// Which instruction-set path the running processor may take. Read once; tests may lower it.
#pragma once

namespace penstock {

enum class CpuLevel { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

// Best level of this processor and operating system, detected on first use. Thread-safe.
CpuLevel detected_cpu_level();

// The level in force: the detected one, or a lower one set by force_cpu_level (tests, benchmarks).
CpuLevel cpu_level();
// Lowers (never raises) the level in force; returns the level that now holds. Not for use while batches run.
CpuLevel force_cpu_level(CpuLevel level);

}  // namespace penstock
