// FeatureReader: rows come whole from the cache or from what was loaded, on many threads beside a writer, and
// no params, however garbled, do harm.
#include <atomic>
#include <cmath>
#include <thread>

#include "../random.h"
#include "engine/feature_reader.h"
#include "sum_service.h"

using namespace penstock;
using namespace penstock::sum_service;

namespace {

constexpr int64_t kNow = 1000;

// ["-", {"user": [keys]}, nil]
std::vector<uint8_t> params_of(const std::vector<int64_t>& keys) {
  std::vector<uint8_t> bytes = {0x93, 0xa1, '-', 0x81, 0xa4, 'u', 's', 'e', 'r', 0xdd};
  const auto n = static_cast<uint32_t>(keys.size());
  for (int shift = 24; shift >= 0; shift -= 8) bytes.push_back(static_cast<uint8_t>(n >> shift));
  for (const int64_t key : keys) {
    bytes.push_back(0xd3);
    for (int shift = 56; shift >= 0; shift -= 8)
      bytes.push_back(static_cast<uint8_t>(static_cast<uint64_t>(key) >> shift));
  }
  bytes.push_back(0xc0);
  return bytes;
}

std::vector<uint64_t> row_of(float a) {
  RowSchema schema;
  CHECK(RowSchema::create(fields(), &schema).is_ok());
  std::vector<uint64_t> row(schema.row_words());
  const uint8_t present = 0;
  schema.init(row.data(), row.size(), 1, &present);
  Block block;
  block.valid = 1;
  for (size_t f = 0; f < kFeatures; ++f) {
    block.f64[0] = a * static_cast<double>(f + 1);
    schema.store(f, block, 1, row.data(), row.size());
  }
  return row;
}

std::shared_ptr<FeatureCache> make_cache(uint32_t row_words) {
  std::unique_ptr<FeatureCache> cache;
  CHECK(FeatureCache::create({4096, row_words, 0, 0, 0.0}, &cache).is_ok());
  return cache;
}

const RowMeta kMeta{0, 2000, 5, 5};

void misses_then_loaded_then_hits() {
  const auto words = static_cast<uint32_t>(row_of(1).size());
  const auto cache = make_cache(words);
  const FeatureReader reader(make_plan(cache), {});
  for (const size_t n : {1, 2, 63, 64, 65, 200}) {  // blocks of 64
    std::vector<int64_t> keys;
    for (size_t i = 0; i < n; ++i) keys.push_back(static_cast<int64_t>(1000 * n + i));
    const auto params = params_of(keys);
    FeatureReader::Work work;
    CHECK(reader.parse(params.data(), params.size(), work).is_ok());
    CHECK(work.call.rows == n);
    std::vector<float> out(n * kFeatures, -1.0F);
    CHECK(reader.read(kNow, 0, nullptr, work, out.data()).is_ok());
    CHECK(work.misses.size() == n);
    for (const float value : out) CHECK(value == -1.0F);  // nothing is written before all is there
    Overlay overlay;
    overlay.index.assign(n, -1);
    for (const FeatureMiss& miss : work.misses) {
      overlay.index[miss.row] = static_cast<int64_t>(overlay.words.size());
      overlay.words.push_back(row_of(static_cast<float>(miss.row)));
      overlay.meta.push_back(kMeta);
    }
    CHECK(reader.read(kNow, 0, &overlay, work, out.data()).is_ok());
    CHECK(work.misses.empty());
    for (size_t r = 0; r < n; ++r) {
      for (size_t f = 0; f < kFeatures; ++f)
        CHECK(out[r * kFeatures + f] == static_cast<float>(r) * static_cast<float>(f + 1));
      const auto row = row_of(static_cast<float>(r) + 7);
      cache->put(key_of_int(keys[r]), row.data(), kMeta, 1, 0, 0);
    }
    CHECK(reader.read(kNow, 0, nullptr, work, out.data()).is_ok());
    CHECK(work.misses.empty());
    for (size_t r = 0; r < n; ++r) CHECK(out[r * kFeatures] == static_cast<float>(r) + 7);
    CHECK(reader.read(2000, 0, nullptr, work, out.data()).is_ok());
    CHECK(work.misses.size() == n);  // no row holds any more
  }
}

void readers_beside_a_writer() {
  const auto words = static_cast<uint32_t>(row_of(1).size());
  const auto cache = make_cache(words);
  const FeatureReader reader(make_plan(cache), {});
  std::vector<int64_t> keys;
  for (int64_t key = 0; key < 80; ++key) {
    keys.push_back(key);
    const auto row = row_of(0);
    cache->put(key_of_int(key), row.data(), kMeta, 1, 0, 0);
  }
  const auto params = params_of(keys);
  std::atomic<bool> done{false};
  std::vector<std::thread> readers;
  for (int t = 0; t < 3; ++t) {
    readers.emplace_back([&] {
      FeatureReader::Work work;
      std::vector<float> out(keys.size() * kFeatures), last(keys.size(), 0.0F);
      while (!done.load()) {
        CHECK(reader.parse(params.data(), params.size(), work).is_ok());
        CHECK(reader.read(kNow, 0, nullptr, work, out.data()).is_ok());
        if (!work.misses.empty()) continue;  // a bucket that is being written
        for (size_t r = 0; r < keys.size(); ++r) {
          const float* row = &out[r * kFeatures];
          CHECK(row[1] == 2 * row[0] && row[2] == 3 * row[0]);  // whole
          CHECK(row[0] >= last[r]);                             // never back
          last[r] = row[0];
        }
      }
    });
  }
  for (int i = 1; i <= 300; ++i) {
    const auto row = row_of(static_cast<float>(i));
    for (const int64_t key : keys) {
      cache->put(key_of_int(key), row.data(), kMeta, 1 + static_cast<uint64_t>(i), 0, 0);
    }
  }
  done = true;
  for (std::thread& thread : readers) thread.join();
}

void garbled_params() {
  const auto words = static_cast<uint32_t>(row_of(1).size());
  const FeatureReader reader(make_plan(make_cache(words)), {});
  const auto good = params_of({1, 2, 3});
  FeatureReader::Work work;
  for (int i = 0; i < 20000; ++i) {
    std::vector<uint8_t> bytes = good;
    for (uint64_t k = random_below(4); k-- > 0;)
      bytes[random_below(bytes.size())] = static_cast<uint8_t>(random_below(256));
    if (random_below(3) == 0) bytes.resize(random_below(bytes.size() + 1));
    if (!reader.parse(bytes.data(), bytes.size(), work).is_ok()) continue;
    std::vector<float> out(work.call.rows * kFeatures);
    (void)reader.read(kNow, 0, nullptr, work, out.data());
  }
}

}  // namespace

int main() {
  misses_then_loaded_then_hits();
  readers_beside_a_writer();
  garbled_params();
  return 0;
}
