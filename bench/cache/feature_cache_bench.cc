// Times FeatureCache::get_many over random resident keys. bench/cache/bench.py builds and runs it; prints one
// JSON object. Arguments: keys, row_words, batch, rounds, batches a round.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cache/feature_cache.h"

namespace {

using Clock = std::chrono::steady_clock;
using penstock::FeatureCache;
using penstock::Key128;
using penstock::ReadStatus;
using penstock::RowMeta;

uint64_t next_random(uint64_t& state) {
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return state;
}

Key128 key_of(uint64_t number) {
  return {number * 0x9e3779b97f4a7c15U + 1, number ^ 0x5bd1e995U};
}

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "feature_cache_bench: %s\n", what);
  std::exit(1);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 6) fail("expected keys row_words batch rounds batches");
  const uint64_t n_keys = std::strtoull(argv[1], nullptr, 10);
  const auto words = static_cast<uint32_t>(std::strtoul(argv[2], nullptr, 10));
  const size_t batch = std::strtoull(argv[3], nullptr, 10);
  const size_t rounds = std::strtoull(argv[4], nullptr, 10);
  const size_t batches = std::strtoull(argv[5], nullptr, 10);

  std::unique_ptr<FeatureCache> cache;
  if (!FeatureCache::create({n_keys + n_keys / 2, words, 0}, &cache).is_ok()) fail("create");
  std::vector<uint64_t> row(words);
  for (uint64_t k = 0; k < n_keys; ++k) {
    std::fill(row.begin(), row.end(), k);
    cache->put(key_of(k), row.data(), RowMeta{0, 1'000'000, 5, 5}, 1, 0, 0);
  }

  std::vector<Key128> keys(batches * batch);
  std::vector<uint64_t> numbers(keys.size());
  std::vector<uint64_t> rows(batch * words);
  std::vector<ReadStatus> status(batch);
  uint64_t random = 88172645463325252U;
  size_t hits = 0;
  std::printf("{\"bytes\": %llu, \"ns_per_row\": [", static_cast<unsigned long long>(cache->stats().bytes));
  for (size_t round = 0; round < rounds; ++round) {
    for (size_t i = 0; i < keys.size(); ++i) {
      numbers[i] = next_random(random) % n_keys;
      keys[i] = key_of(numbers[i]);
    }
    const auto start = Clock::now();
    for (size_t b = 0; b < batches; ++b) {
      hits += cache->get_many(keys.data() + b * batch, batch, 10, 10, rows.data(), status.data(), nullptr,
                              nullptr);
    }
    const double ns = std::chrono::duration<double, std::nano>(Clock::now() - start).count();
    std::printf("%s%.3f", round == 0 ? "" : ", ", ns / static_cast<double>(keys.size()));
    const uint64_t* last = numbers.data() + numbers.size() - batch;
    for (size_t i = 0; i < batch; ++i) {
      if (status[i] != ReadStatus::kHit) continue;
      for (uint32_t w = 0; w < words; ++w) {
        if (rows[i * words + w] != last[i]) fail("a row differs from what was put");
      }
    }
  }
  std::printf("], \"hit_share\": %.6f}\n",
              static_cast<double>(hits) / static_cast<double>(rounds * keys.size()));
  return 0;
}
