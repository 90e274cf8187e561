// Two writers, two readers, more keys than slots. Each key has one writer and rising stamps; each row is a
// function of (key, stamp). A hit must be whole, no older than the last put that ended before the read began,
// no newer than the last begun before it ended, and must never go back for one reader.
#include <array>
#include <atomic>
#include <thread>
#include <vector>

#include "base/cpu.h"
#include "cache/feature_cache.h"
#include "cache/wide_reads.h"
#include "check.h"

namespace {

using penstock::FeatureCache;
using penstock::Key128;
using penstock::ReadStatus;
using penstock::RowMeta;

constexpr uint32_t kWords = 9;
constexpr uint64_t kKeys = 40;
constexpr uint64_t kPuts = 150000;

Key128 key_of(uint64_t k) {
  return {k * 0x9e3779b97f4a7c15U, k};
}
uint64_t word_of(uint64_t k, uint64_t stamp, uint64_t i) {
  return (k << 48) ^ (stamp << 8) ^ (i * 0x101);
}

std::array<std::atomic<uint64_t>, kKeys> begun, ended;
std::atomic<uint64_t> next_stamp{1};
std::atomic<int> writers_left{2};

void run_writer(FeatureCache& cache, uint32_t owner) {
  uint64_t random = owner + 1;
  uint64_t row[kWords];
  for (uint64_t n = 0; n < kPuts; ++n) {
    random = random * 6364136223846793005U + 1442695040888963407U;
    const uint64_t k = (random >> 33) % (kKeys / 2) * 2 + owner;
    const uint64_t stamp = next_stamp.fetch_add(1);
    for (uint64_t i = 0; i < kWords; ++i) row[i] = word_of(k, stamp, i);
    begun[k].store(stamp);
    if ((random >> 60) == 0) {
      cache.discard(key_of(k), stamp, owner);
    } else {
      const auto s = static_cast<int64_t>(stamp);
      cache.put(key_of(k), row, RowMeta{0, 1000, s, static_cast<int64_t>(k)}, stamp, 0, owner);
    }
    ended[k].store(stamp);
  }
  writers_left.fetch_sub(1);
}

void run_reader(FeatureCache& cache, uint64_t* hits) {
  std::array<uint64_t, kKeys> last{}, floor{}, versions{};
  std::array<Key128, kKeys> keys;
  for (uint64_t k = 0; k < kKeys; ++k) keys[k] = key_of(k);
  std::array<ReadStatus, kKeys> status;
  std::array<RowMeta, kKeys> meta;
  std::vector<uint64_t> rows(kKeys * kWords);
  bool more = true;
  while (more) {
    more = writers_left.load() != 0;
    for (uint64_t k = 0; k < kKeys; ++k) floor[k] = ended[k].load();
    *hits +=
        cache.get_many(keys.data(), kKeys, 5, 5, rows.data(), status.data(), meta.data(), versions.data());
    for (uint64_t k = 0; k < kKeys; ++k) {
      CHECK(status[k] != ReadStatus::kExpired);
      CHECK((status[k] == ReadStatus::kHit) == (versions[k] != 0));
      if (status[k] != ReadStatus::kHit) continue;
      const auto stamp = static_cast<uint64_t>(meta[k].event_time);
      CHECK(meta[k].known_at == static_cast<int64_t>(k));
      for (uint64_t i = 0; i < kWords; ++i) CHECK(rows[k * kWords + i] == word_of(k, stamp, i));
      CHECK(stamp >= last[k]);
      CHECK(stamp >= floor[k]);
      CHECK(stamp <= begun[k].load());
      last[k] = stamp;
    }
  }
}

void run_all() {
  for (auto& stamp : begun) stamp.store(0);
  for (auto& stamp : ended) stamp.store(0);
  writers_left.store(2);
  std::unique_ptr<FeatureCache> cache;
  CHECK(FeatureCache::create({30, kWords, 0}, &cache).is_ok());
  uint64_t hits[2] = {};
  std::thread threads[] = {std::thread(run_writer, std::ref(*cache), 0U),
                           std::thread(run_writer, std::ref(*cache), 1U),
                           std::thread(run_reader, std::ref(*cache), &hits[0]),
                           std::thread(run_reader, std::ref(*cache), &hits[1])};
  for (std::thread& thread : threads) thread.join();
  CHECK(hits[0] > 0 && hits[1] > 0);
  CHECK(cache->stats().evictions > 0);
  CHECK(cache->stats().size <= cache->stats().capacity);
  CHECK(cache->stats().hits == hits[0] + hits[1]);
}

}  // namespace

// Once with each way to read rows that this build and processor have.
int main() {
  using penstock::CpuLevel;
  const penstock::WideReads* last = nullptr;
  for (const CpuLevel level : {CpuLevel::kAvx512, CpuLevel::kAvx2, CpuLevel::kPortable}) {
    if (penstock::force_cpu_level(level) != level) continue;
    const penstock::WideReads* wide = penstock::wide_reads();
    if (level != CpuLevel::kPortable && wide == last) continue;
    last = wide;
    run_all();
  }
  return 0;
}
