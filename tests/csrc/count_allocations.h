// Counts every allocation of the program that includes it, in one of its files.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

namespace {
// No partner: only the sum matters.
std::atomic<uint64_t> allocations{0};
}  // namespace

// noinline: the compiler may otherwise pair these with its own.
__attribute__((noinline)) void* operator new(size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  void* made = std::malloc(size == 0 ? 1 : size);
  if (made == nullptr) std::abort();
  return made;
}
__attribute__((noinline)) void operator delete(void* at) noexcept {
  std::free(at);
}
__attribute__((noinline)) void operator delete(void* at, size_t) noexcept {
  std::free(at);
}
