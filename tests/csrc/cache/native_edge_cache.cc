// The edge cache against a plain map: TTL and validity at their edges, forced hash collisions, changes of the
// feature rows, capacity, admission (its hit ratio beside LRU's on a Zipf trace), aging. Then under threads:
// a hit is whole, and never made from a feature row that was replaced before the read began.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <list>
#include <map>
#include <random>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../check.h"
#include "cache/edge_cache.h"

using namespace penstock;

namespace {

constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9U;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebU;
  return x ^ (x >> 31);
}

Key128 key_of(uint64_t k) {
  return {mix(k + 0x9e3779b97f4a7c15U), mix(k * 2 + 1)};
}

// A row whose every part is a function of (key, stamp), and the arrays behind it.
struct Row {
  std::vector<double> scores;
  std::vector<float> features;
  std::vector<int64_t> event_time;
  std::vector<Key128> keys;
  std::vector<uint64_t> versions;
  EdgeRow row;

  Row(uint32_t outputs, uint32_t n_features, size_t views)
      : scores(outputs), features(n_features), event_time(views), keys(views), versions(views) {
    row = {scores.data(), features.data(), event_time.data(), keys.data(), versions.data(), 0, kForever, 0};
  }
  void fill(uint64_t k, uint64_t stamp) {
    for (size_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<double>(k * 1000 + stamp * 7 + i);
    for (size_t i = 0; i < features.size(); ++i) features[i] = static_cast<float>(k + stamp + i);
    for (size_t i = 0; i < event_time.size(); ++i) event_time[i] = static_cast<int64_t>(k ^ (stamp << 8));
    row.status = static_cast<uint8_t>((k + stamp) % 4);
  }
  void check(uint64_t k, uint64_t stamp) const {
    Row want(static_cast<uint32_t>(scores.size()), static_cast<uint32_t>(features.size()), keys.size());
    want.fill(k, stamp);
    CHECK(scores == want.scores);
    CHECK(features == want.features);
    CHECK(event_time == want.event_time);
    CHECK(row.status == want.row.status);
  }
};

std::unique_ptr<EdgeCache> make(EdgeCacheConfig config) {
  std::unique_ptr<EdgeCache> cache;
  CHECK(EdgeCache::create(config, &cache).is_ok());
  return cache;
}

std::shared_ptr<FeatureCache> make_view(int64_t ttl_ns = 0) {
  std::unique_ptr<FeatureCache> view;
  CHECK(FeatureCache::create({64, 1, ttl_ns}, &view).is_ok());
  return view;
}

uint64_t put_feature(FeatureCache& view, const Key128& key, uint64_t value, uint64_t stamp,
                     int64_t mono = 0) {
  CHECK(view.put(key, &value, {0, kForever, 0, 0}, stamp, mono, 0) != FeatureCache::PutResult::kSuperseded);
  uint64_t row, version;
  ReadStatus status;
  CHECK(view.get_many(&key, 1, 0, mono, &row, &status, nullptr, &version) == 1);
  return version;
}

void refuses_bad_shapes() {
  std::unique_ptr<EdgeCache> cache;
  CHECK(!EdgeCache::create({0, 0, 1, 1, {}}, &cache).is_ok());
  CHECK(!EdgeCache::create({10, 0, 1, 10'000, {}}, &cache).is_ok());
}

void ends_with_its_ttl_and_validity() {
  auto cache = make({100, 100, 1, 3, {}});
  Row in(1, 3, 0), out(1, 3, 0);
  in.fill(1, 1);
  in.row.valid_from = 10;
  in.row.valid_until = 20;
  CHECK(cache->put(key_of(1), in.row, 50) == EdgePut::kStored);
  CHECK(cache->get(key_of(1), 10, 149, &out.row) == EdgeRead::kHit);
  out.check(1, 1);
  CHECK(out.row.valid_from == 10 && out.row.valid_until == 20);
  CHECK(cache->get(key_of(1), 19, 50, &out.row) == EdgeRead::kHit);
  CHECK(cache->get(key_of(1), 10, 150, &out.row) == EdgeRead::kExpired);
  CHECK(cache->get(key_of(1), 9, 60, &out.row) == EdgeRead::kExpired);
  CHECK(cache->get(key_of(1), 20, 60, &out.row) == EdgeRead::kExpired);
  CHECK(cache->get(key_of(2), 10, 60, &out.row) == EdgeRead::kMiss);
  in.fill(1, 2);
  CHECK(cache->put(key_of(1), in.row, 150) == EdgePut::kReplaced);
  CHECK(cache->get(key_of(1), 10, 249, &out.row) == EdgeRead::kHit);
  out.check(1, 2);
  const EdgeCacheStats stats = cache->stats();
  CHECK(stats.hits == 3 && stats.expired == 3 && stats.misses == 1 && stats.stale == 0);
  CHECK(stats.admitted == 2 && stats.size == 1);
  // Past the end of the clock, and without a TTL.
  auto endless = make({10, kForever, 1, 3, {}});
  CHECK(endless->put(key_of(1), in.row, kForever - 5) == EdgePut::kStored);
  CHECK(endless->get(key_of(1), 10, kForever - 1, &out.row) == EdgeRead::kHit);
}

void changes_of_rows_make_it_a_miss() {
  const auto a = make_view(), b = make_view(/*ttl_ns=*/100);
  auto cache = make({100, 0, 2, 4, {a, b}});
  const Key128 ka = key_of(7), kb = key_of(8);
  Row in(2, 4, 2), out(2, 4, 2);
  uint64_t stamp = 0;
  const auto store = [&] {
    in.fill(1, ++stamp);
    in.keys = {ka, kb};
    in.versions = {put_feature(*a, ka, stamp, stamp), put_feature(*b, kb, stamp, stamp, 1000)};
    CHECK(cache->put(key_of(1), in.row, 1000) != EdgePut::kStale);
    CHECK(cache->get(key_of(1), 0, 1000, &out.row) == EdgeRead::kHit);
    out.check(1, stamp);
    CHECK(out.keys == in.keys && out.versions == in.versions);
  };
  store();
  (void)put_feature(*a, ka, stamp, stamp);  // the same bits again are another put
  CHECK(cache->get(key_of(1), 0, 1000, &out.row) == EdgeRead::kStale);
  CHECK(cache->put(key_of(1), in.row, 1000) == EdgePut::kStale);
  store();
  a->discard(ka, 1000, 0);
  CHECK(cache->get(key_of(1), 0, 1000, &out.row) == EdgeRead::kStale);
  stamp = 1000;
  store();
  b->clear();
  CHECK(cache->get(key_of(1), 0, 1000, &out.row) == EdgeRead::kStale);
  store();
  CHECK(cache->get(key_of(1), 0, 1099, &out.row) == EdgeRead::kHit);
  CHECK(cache->get(key_of(1), 0, 1100, &out.row) == EdgeRead::kStale);  // b's row is past its memory TTL
  // Eviction by other keys: 64 slots are 5 buckets of 15.
  store();
  for (uint64_t k = 100; k < 3000; ++k) (void)put_feature(*a, key_of(k), k, ++stamp);
  CHECK(cache->get(key_of(1), 0, 1000, &out.row) == EdgeRead::kStale);
  // Version 0 depends on nothing.
  in.versions = {0, 0};
  CHECK(cache->put(key_of(2), in.row, 1000) == EdgePut::kStored);
  a->clear();
  CHECK(cache->get(key_of(2), 0, 1000, &out.row) == EdgeRead::kHit);
  CHECK(cache->stats().stale == 5);
}

// Any sequence of operations: a hit is the last admitted put of that very key, and no live entry of a bucket
// with room is missing.
void agrees_with_a_map(uint64_t hash_mask, uint64_t seed) {
  constexpr uint64_t kKeys = 40;
  constexpr int64_t kTtl = 300;
  auto cache = make({45, kTtl, 1, 3, {}, true, hash_mask});
  struct Known {
    uint64_t stamp;
    int64_t until_mono, valid_from, valid_until;
  };
  std::map<uint64_t, Known> known;
  std::mt19937_64 rng(seed);
  Row in(1, 3, 0), out(1, 3, 0);
  int64_t mono = 0;
  uint64_t hits = 0, stored = 0;
  for (uint64_t turn = 1; turn < 20'000; ++turn) {
    mono += static_cast<int64_t>(rng() % 4);
    const uint64_t k = rng() % kKeys;
    const auto now = static_cast<int64_t>(rng() % 100);
    if (rng() % 3 == 0) {
      in.fill(k, turn);
      in.row.valid_from = static_cast<int64_t>(rng() % 30);
      in.row.valid_until = 70 + static_cast<int64_t>(rng() % 30);
      const EdgePut put = cache->put(key_of(k), in.row, mono);
      CHECK(put != EdgePut::kStale);
      if (put == EdgePut::kRejected) {
        CHECK(cache->stats().size >= EdgeCache::kWays);  // its bucket is full
        continue;
      }
      known[k] = {turn, mono + kTtl, in.row.valid_from, in.row.valid_until};
      CHECK(cache->peek(key_of(k), in.row.valid_from, mono, &out.row) == EdgeRead::kHit);
      ++stored;
    } else {
      const EdgeRead read = cache->get(key_of(k), now, mono, &out.row);
      const auto at = known.find(k);
      const bool live = at != known.end() && mono < at->second.until_mono && now >= at->second.valid_from &&
                        now < at->second.valid_until;
      if (read == EdgeRead::kHit) {
        CHECK(live);
        out.check(k, at->second.stamp);
        ++hits;
      }
      if (read == EdgeRead::kExpired) CHECK(at != known.end() && !live);
    }
    CHECK(cache->stats().size <= cache->stats().capacity);
  }
  CHECK(hits > 500 && stored > 500);
}

// Ranks 0..n-1 with probability 1 / (rank + 1), by the inverse of the cumulative sums.
struct Zipf {
  std::vector<double> sums;
  explicit Zipf(size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; ++i) sums.push_back(sum += 1.0 / static_cast<double>(i + 1));
  }
  uint64_t operator()(std::mt19937_64& rng) const {
    const double at = static_cast<double>(rng() >> 11) * 0x1p-53 * sums.back();
    return static_cast<uint64_t>(std::upper_bound(sums.begin(), sums.end(), at) - sums.begin());
  }
};

struct Lru {
  size_t capacity;
  std::list<uint64_t> order;
  std::unordered_map<uint64_t, std::list<uint64_t>::iterator> at;
  bool access(uint64_t k) {
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

bool access(EdgeCache& cache, uint64_t k, Row& in, Row& out) {
  if (cache.get(key_of(k), 0, 0, &out.row) == EdgeRead::kHit) return true;
  (void)cache.put(key_of(k), in.row, 0);
  return false;
}

void keeps_what_is_frequent() {
  constexpr size_t kCapacity = 1005, kAccesses = 200'000;
  Row in(1, 1, 0), out(1, 1, 0);
  in.fill(0, 0);
  const Zipf zipf(100'000);
  std::mt19937_64 rng(3);
  auto cache = make({kCapacity, 0, 1, 1, {}});
  CHECK(cache->stats().capacity == kCapacity);
  Lru lru{kCapacity, {}, {}};
  size_t hits = 0, lru_hits = 0;
  for (size_t i = 0; i < kAccesses; ++i) {
    const uint64_t k = zipf(rng);
    hits += access(*cache, k, in, out) ? 1 : 0;
    lru_hits += lru.access(k) ? 1 : 0;
  }
  std::printf("zipf: hit ratio %.4f, of lru %.4f\n", static_cast<double>(hits) / kAccesses,
              static_cast<double>(lru_hits) / kAccesses);
  CHECK(hits > lru_hits * 110 / 100);
  // A scan of keys that never return leaves the frequent ones in place; lru keeps none of them.
  size_t kept = 0, kept_before = 0;
  for (uint64_t k = 0; k < 100; ++k)
    kept_before += cache->peek(key_of(k), 0, 0, &out.row) == EdgeRead::kHit ? 1 : 0;
  for (uint64_t k = 1'000'000; k < 1'003'000; ++k) CHECK(!access(*cache, k, in, out));
  for (uint64_t k = 0; k < 100; ++k) kept += cache->peek(key_of(k), 0, 0, &out.row) == EdgeRead::kHit ? 1 : 0;
  CHECK(kept_before >= 95 && kept >= kept_before - 2);
  // Yesterday's favourites give way: after their traffic has ended, others take all of their room.
  for (int round = 0; round < 60; ++round) {
    for (uint64_t k = 2'000'000; k < 2'000'500; ++k) access(*cache, k, in, out);
  }
  size_t taken = 0;
  for (uint64_t k = 2'000'000; k < 2'000'500; ++k)
    taken += cache->peek(key_of(k), 0, 0, &out.row) == EdgeRead::kHit ? 1 : 0;
  CHECK(taken >= 490);
}

void counts_and_forgets() {
  auto cache = make({4000, 0, 1, 1, {}});
  CHECK(cache->frequency(key_of(1)) == 0);
  cache->record(key_of(1), 1);
  CHECK(cache->frequency(key_of(1)) == 1);
  cache->record(key_of(1), 4);
  CHECK(cache->frequency(key_of(1)) == 5);
  cache->record(key_of(1), 100);
  CHECK(cache->frequency(key_of(1)) >= 14 && cache->frequency(key_of(1)) <= FrequencySketch::kMost);
  for (uint64_t k = 100; k < 100 + 8 * 40'000; ++k) cache->record(key_of(k), 1);
  CHECK(cache->frequency(key_of(1)) <= 4);
}

// Feature row f takes stamps 1, 2, ...; entry k is made from row k % kRows as a reader of it would. A hit
// must be of a stamp no older than the last put that ended before the read began.
void threads() {
  constexpr uint64_t kRows = 8, kEntries = 64, kPuts = 6000;
  const auto view = make_view();
  auto cache = make({45, 0, 2, 7, {view}});
  std::array<std::atomic<uint64_t>, kRows> ended{};
  std::atomic<int> writers{1};
  std::atomic<uint64_t> total_hits{0};
  for (uint64_t f = 0; f < kRows; ++f) {
    (void)put_feature(*view, key_of(f), 1, 1);
    ended[f] = 1;
  }
  std::thread features([&] {
    std::mt19937_64 rng(1);
    for (uint64_t stamp = 2; stamp < kPuts; ++stamp) {
      const uint64_t f = rng() % kRows;
      (void)view->put(key_of(f), &stamp, {0, kForever, 0, 0}, stamp, 0, 0);
      ended[f] = stamp;
      for (int i = 0; i < 40; ++i) sync::pause();
      if (stamp % 16 == 0) std::this_thread::yield();
    }
    writers = 0;
  });
  const auto worker = [&](uint64_t seed) {
    std::mt19937_64 rng(seed);
    Row in(2, 7, 1), out(2, 7, 1);
    uint64_t hits = 0;
    while (writers != 0) {
      const uint64_t k = rng() % kEntries, f = k % kRows;
      const uint64_t floor = ended[f];
      if (cache->get(key_of(k), 0, 0, &out.row) == EdgeRead::kHit) {
        const uint64_t stamp = (static_cast<uint64_t>(out.event_time[0]) ^ k) >> 8;
        out.check(k, stamp);
        CHECK(stamp >= floor);
        ++hits;
        continue;
      }
      uint64_t stamp, version;
      ReadStatus status;
      const Key128 key = key_of(f);
      if (view->get_many(&key, 1, 0, 0, &stamp, &status, nullptr, &version) == 0) continue;
      in.fill(k, stamp);
      in.keys = {key};
      in.versions = {version};
      (void)cache->put(key_of(k), in.row, 0);
    }
    total_hits += hits;
  };
  std::vector<std::thread> workers;
  for (uint64_t seed = 2; seed < 5; ++seed) workers.emplace_back(worker, seed);
  features.join();
  for (std::thread& each : workers) each.join();
  std::printf("threads: %llu hits\n", static_cast<unsigned long long>(total_hits.load()));
  CHECK(total_hits > 0);
}

}  // namespace

int main() {
  refuses_bad_shapes();
  ends_with_its_ttl_and_validity();
  changes_of_rows_make_it_a_miss();
  for (uint64_t seed = 1; seed <= 3; ++seed) {
    agrees_with_a_map(~uint64_t{0}, seed);
    agrees_with_a_map(0, seed);  // one bucket, one tag: only the whole key tells entries apart
  }
  counts_and_forgets();
  keeps_what_is_frequent();
  threads();
  return 0;
}
