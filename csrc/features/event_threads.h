// Work that is shared out over threads for as long as one call lasts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <system_error>
#include <thread>
#include <vector>

namespace penstock {

// Runs f(0) .. f(parts - 1), each on a thread where one can be had.
template <class F>
void in_parts(unsigned parts, F&& f) {
  std::vector<std::thread> threads;
  unsigned own = 1;
  try {
    for (; own < parts; ++own) threads.emplace_back(f, own);
  } catch (const std::system_error&) {
  }
  f(0u);
  for (; own < parts; ++own) f(own);
  for (std::thread& thread : threads) thread.join();
}

// How many parts of at least 4096 rows are worth a thread each.
inline unsigned parts_of(size_t rows, unsigned threads) {
  return static_cast<unsigned>(std::clamp<size_t>(rows / size_t{4096}, 1, std::max(1u, threads)));
}

}  // namespace penstock
