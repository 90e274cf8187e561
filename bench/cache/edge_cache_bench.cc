// The edge cache's costs: a probe that hits and one that misses, the fingerprint of a row of floats, and a
// miss with its entry under traffic that never repeats, nanoseconds each, least of many short runs; then its
// hit ratio on Zipf 1.0 beside that of LRU of the same capacity. Prints one JSON object.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <list>
#include <random>
#include <unordered_map>
#include <vector>

#include "base/siphash.h"
#include "cache/edge_cache.h"

using namespace penstock;

namespace {

constexpr uint32_t kFeatures = 32;
constexpr uint64_t kCapacity = 65536;

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}
Key128 key_of(uint64_t k) {
  return {mix(k + 0x9e3779b97f4a7c15U), mix(2 * k + 1)};
}

std::unique_ptr<EdgeCache> make() {
  std::unique_ptr<EdgeCache> cache;
  if (!EdgeCache::create({kCapacity, 0, 1, kFeatures, {}}, &cache).is_ok()) std::abort();
  return cache;
}

// Least nanoseconds an operation of `runs` runs of n.
template <class Run>
double least(int runs, uint64_t n, Run&& run) {
  double best = 1e18;
  for (int i = 0; i < runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    for (uint64_t k = 0; k < n; ++k) run(k);
    const std::chrono::duration<double, std::nano> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count() / static_cast<double>(n));
  }
  return best;
}

struct Lru {
  std::list<uint64_t> order;
  std::unordered_map<uint64_t, std::list<uint64_t>::iterator> at;
  bool access(uint64_t k, size_t capacity) {
    if (const auto found = at.find(k); found != at.end()) {
      order.splice(order.begin(), order, found->second);
      return true;
    }
    if (at.size() == capacity) {
      at.erase(order.back());
      order.pop_back();
    }
    order.push_front(k);
    at[k] = order.begin();
    return false;
  }
};

}  // namespace

int main() {
  double score = 1;
  std::vector<float> features(kFeatures, 1.5f), out_features(kFeatures);
  double out_score;
  const EdgeRow in{&score, features.data(), nullptr, nullptr, nullptr, 0, INT64_MAX, 0};
  EdgeRow out{&out_score, out_features.data(), nullptr, nullptr, nullptr};

  const auto cache = make();
  constexpr uint64_t kN = 4096;
  std::vector<Key128> held, strange;
  for (uint64_t k = 0; k < kN; ++k) {
    held.push_back(key_of(k));
    strange.push_back(key_of(k + (uint64_t{1} << 40)));
    (void)cache->put(held.back(), in, 0);
  }
  uint64_t hits = 0;
  const double hit =
      least(200, kN, [&](uint64_t k) { hits += cache->get(held[k], 0, 0, &out) == EdgeRead::kHit ? 1 : 0; });
  const double miss = least(
      200, kN, [&](uint64_t k) { hits += cache->get(strange[k], 0, 0, &out) == EdgeRead::kHit ? 1 : 0; });
  if (hits != 200 * kN) std::abort();
  const uint8_t seed[16] = {};
  uint64_t sum = 0;
  const double fingerprint = least(200, kN, [&](uint64_t k) {
    SipHash128 hash(seed);
    features[0] = static_cast<float>(k);
    hash.add(features.data(), kFeatures * sizeof(float));
    Key128 key;
    hash.finish(&key.lo, &key.hi);
    sum += key.lo;
  });

  // A full cache, and keys that never return: get, then put, which finds no room worth having.
  const auto full = make();
  uint64_t next = 0;
  for (; next < 4 * kCapacity; ++next) {
    (void)full->get(key_of(next), 0, 0, &out);
    (void)full->put(key_of(next), in, 0);
  }
  const double unique = least(200, kN, [&](uint64_t) {
    const Key128 key = key_of(next++);
    (void)full->get(key, 0, 0, &out);
    (void)full->put(key, in, 0);
  });

  constexpr size_t kKeys = 1'000'000, kAccesses = 2'000'000;
  std::vector<double> sums;
  double total = 0;
  for (size_t i = 0; i < kKeys; ++i) sums.push_back(total += 1.0 / static_cast<double>(i + 1));
  std::mt19937_64 rng(7);
  const auto zipf = make();
  Lru lru;
  size_t zipf_hits = 0, lru_hits = 0, counted = 0;
  for (size_t i = 0; i < kAccesses; ++i) {
    const double at = static_cast<double>(rng() >> 11) * 0x1p-53 * total;
    const auto k = static_cast<uint64_t>(std::upper_bound(sums.begin(), sums.end(), at) - sums.begin());
    const bool found = zipf->get(key_of(k), 0, 0, &out) == EdgeRead::kHit;
    if (!found) (void)zipf->put(key_of(k), in, 0);
    const bool in_lru = lru.access(k, kCapacity);
    if (i < kAccesses / 2) continue;  // warm
    ++counted;
    zipf_hits += found ? 1 : 0;
    lru_hits += in_lru ? 1 : 0;
  }
  std::printf(
      "{\"fingerprint_ns\": %.1f, \"hit_ns\": %.1f, \"miss_ns\": %.1f, \"unique_ns\": %.1f, "
      "\"zipf_hit_ratio\": %.4f, \"lru_hit_ratio\": %.4f, \"bytes\": %llu, \"check\": %llu}\n",
      fingerprint, hit, miss, unique, static_cast<double>(zipf_hits) / static_cast<double>(counted),
      static_cast<double>(lru_hits) / static_cast<double>(counted),
      static_cast<unsigned long long>(cache->bytes()), static_cast<unsigned long long>(sum & 1));
  return 0;
}
