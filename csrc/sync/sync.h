// The one header through which the cache touches shared words: plain 64-bit storage and std::atomic_ref, or
// Relacy's checked atomics when PENSTOCK_RELACY is defined, so that the shipped protocol is what is modelled.
// Any thread. The partner of each access is named where the access is made.
#pragma once

#include <cstdint>

#ifdef PENSTOCK_RELACY
#include <relacy/relacy.hpp>
#else
#include <atomic>
#endif

namespace penstock::sync {

#ifdef PENSTOCK_RELACY

using Word = rl::atomic<uint64_t>;
using Order = rl::memory_order;
inline constexpr Order kRelaxed = rl::mo_relaxed;
inline constexpr Order kAcquire = rl::mo_acquire;
inline constexpr Order kRelease = rl::mo_release;

inline uint64_t load(Word& word, Order order) {
  return word.load(order, RL_INFO);
}
inline void store(Word& word, uint64_t value, Order order) {
  word.store(value, order, RL_INFO);
}
inline void fence(Order order) {
  rl::atomic_thread_fence(order, RL_INFO);
}

#else

using Word = uint64_t;
using Order = std::memory_order;
inline constexpr Order kRelaxed = std::memory_order_relaxed;
inline constexpr Order kAcquire = std::memory_order_acquire;
inline constexpr Order kRelease = std::memory_order_release;

inline uint64_t load(Word& word, Order order) {
  return std::atomic_ref<uint64_t>(word).load(order);
}
inline void store(Word& word, uint64_t value, Order order) {
  std::atomic_ref<uint64_t>(word).store(value, order);
}
inline uint64_t add(Word& word, uint64_t value) {
  return std::atomic_ref<uint64_t>(word).fetch_add(value, kRelaxed);
}
inline uint64_t set_bits(Word& word, uint64_t bits) {
  return std::atomic_ref<uint64_t>(word).fetch_or(bits, kRelaxed);
}
inline bool compare_exchange(Word& word, uint64_t& expected, uint64_t desired, Order success) {
  return std::atomic_ref<uint64_t>(word).compare_exchange_weak(expected, desired, success, kRelaxed);
}

// ThreadSanitizer does not model fences, and gcc says so at each one. Every shared word is atomic, so no
// report depends on them; the Relacy program checks the fences themselves.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wtsan"
#endif
inline void fence(Order order) {
  std::atomic_thread_fence(order);
}
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic pop
#endif

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

#endif

}  // namespace penstock::sync
