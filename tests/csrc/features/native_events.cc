// Event tables under sanitizers: readers while one thread appends see all of an append or nothing of it, and
// stored tiles change no bit.
#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "../check.h"
#include "../random.h"
#include "features/event_table.h"

namespace {

using penstock::Aggregate;
using penstock::AggregateKind;
using penstock::EventRows;
using penstock::EventTable;
using penstock::FeatureDtype;
using penstock::FeatureProgram;
using penstock::Key128;
using penstock::RawColumn;
using penstock::RowsAsked;
using penstock::RowsFound;
using penstock::ViewSpec;
using penstock::Word;

constexpr int64_t kSecond = 1000000;
constexpr size_t kKeys = 4;

template <class T>
void put(std::vector<uint8_t>* out, T value) {
  const size_t at = out->size();
  out->resize(at + sizeof(T));
  std::memcpy(out->data() + at, &value, sizeof(T));
}

// x = f, a float64 column.
std::shared_ptr<const FeatureProgram> column_program() {
  std::vector<uint8_t> bytes = {'P', 'S', 'F', 'P'};
  for (const uint32_t count : {1, 1, 1, 0, 0, 0}) put(&bytes, count);
  for (const char name : {'f', 'x'}) {
    put<uint16_t>(&bytes, 1);
    put(&bytes, name);
    put(&bytes, FeatureDtype::kF64);
  }
  put<uint32_t>(&bytes, 0);
  std::shared_ptr<const FeatureProgram> program;
  CHECK(FeatureProgram::parse(bytes.data(), bytes.size(), &program).is_ok());
  return program;
}

struct Rows {
  std::vector<uint64_t> keys;
  std::vector<int64_t> time, known;
  std::vector<uint64_t> ids;
  std::vector<double> values;

  void add(uint64_t key, int64_t t, int64_t k, uint64_t id, double value) {
    keys.push_back(key);
    time.push_back(t);
    known.push_back(k);
    ids.push_back(id);
    ids.push_back(0);
    values.push_back(value);
  }
  EventRows rows(bool versions) const {
    EventRows out;
    out.n = time.size();
    out.keys = {keys.data(), true};
    out.event_time = time.data();
    out.known_at = known.data();
    out.event_ids = versions ? ids.data() : nullptr;
    return out;
  }
  std::vector<RawColumn> raw() const { return {{values.data(), false, nullptr}}; }
};

ViewSpec spec(bool tiles, bool as_known) {
  ViewSpec out;
  out.plain = out.values = column_program();
  out.plain_inputs = out.value_inputs = {0};
  out.value_texts = {false};
  out.windows = {{0, 600 * kSecond, 0, 0, 2 * kSecond, as_known, -1}};
  for (const AggregateKind kind : {AggregateKind::kCount, AggregateKind::kSum, AggregateKind::kVar,
                                   AggregateKind::kMin, AggregateKind::kDistinct}) {
    out.aggregates.push_back({kind, 0, false, 0, kind == AggregateKind::kDistinct ? 16 : 1});
  }
  out.features = {{false, 0}, {true, 0}, {true, 1}, {true, 2}, {true, 3}, {true, 4}};
  out.as_known = as_known;
  out.store_tiles = tiles;
  return out;
}

std::unique_ptr<EventTable> make(const Rows& rows, bool versions, bool tiles, bool as_known) {
  std::unique_ptr<EventTable> table;
  CHECK(EventTable::create(spec(tiles, as_known), rows.rows(versions), rows.raw(), {{}}, 2, &table).is_ok());
  return table;
}

struct Read {
  uint8_t status;
  int64_t meta[4];
  Word values[6];
  bool valid[6];
};

Read read(const EventTable& table, uint64_t key, int64_t now) {
  Read out{};
  const uint64_t words[2] = {key, 0};
  RowsAsked asked;
  asked.n = 1;
  asked.keys = words;
  asked.now = &now;
  RowsFound found;
  found.status = &out.status;
  found.meta = out.meta;
  for (size_t i = 0; i < 6; ++i) {
    found.values.push_back(&out.values[i]);
    found.valid.push_back(&out.valid[i]);
  }
  table.rows_at(asked, found, 1);
  return out;
}

// Each append adds v and -v to one key; with versions it replaces both values of one event pair.
void test_readers_and_an_appender(bool versions) {
  Rows base;
  for (uint64_t key = 0; key < kKeys; ++key) {
    for (int i = 0; i < 160; ++i) {
      base.add(key, (i / 8) * kSecond, i * kSecond, i, i % 2 == 0 ? 1.0 : -1.0);
    }
  }
  const auto table = make(base, versions, true, false);
  std::atomic<bool> done{false};
  std::atomic<int64_t> reads{0};
  std::vector<std::thread> readers;
  for (int r = 0; r < 2; ++r) {
    readers.emplace_back([&, r] {
      for (uint64_t n = 0; !done.load() || n < 50; ++n) {
        const Read row = read(*table, (n + static_cast<uint64_t>(r)) % (kKeys + 2), 500 * kSecond);
        if (row.status == 0) {
          CHECK(row.values[1].i % 2 == 0);
          CHECK(row.values[2].f == 0.0);
          if (versions) CHECK(row.values[1].i == 160);
        }
        std::vector<Key128> keys;
        if (n % 16 == 0) table->changed_keys(0, 100 * kSecond, &keys);
        if (n % 32 == 0) table->keys(&keys);
        reads.fetch_add(1);
      }
    });
  }
  for (int n = 0; n < 400; ++n) {
    const uint64_t key = random_below(versions ? kKeys : kKeys + 2);
    const auto pair = 2 * random_below(80);
    const double value = 1.0 + n % 7;
    Rows more;
    const int64_t t = static_cast<int64_t>(pair / 8) * kSecond;
    more.add(key, t, (1000 + n) * kSecond, pair, value);
    more.add(key, t, (1000 + n) * kSecond, pair + 1, -value);
    std::vector<Key128> keys;
    CHECK(table->append(more.rows(versions), more.raw(), {{}}, &keys).is_ok());
    CHECK(keys.size() == 1 && keys[0].lo == key);
  }
  done.store(true);
  for (std::thread& reader : readers) reader.join();
  CHECK(reads.load() >= 100);
  CHECK(versions || table->n_events() == kKeys * 160 + 800);
}

bool same(const Read& a, const Read& b) {
  bool good = a.status == b.status && std::memcmp(a.meta, b.meta, sizeof(a.meta)) == 0;
  for (size_t i = 0; i < 6; ++i) good = good && a.values[i].i == b.values[i].i && a.valid[i] == b.valid[i];
  return good;
}

void test_tiles_and_appends_change_no_bit(bool versions, bool as_known) {
  for (int round = 0; round < 12; ++round) {
    Rows all;
    for (int i = 0; i < 400; ++i) {
      const auto t = static_cast<int64_t>(random_below(40)) * kSecond;
      const auto known = t + static_cast<int64_t>(random_below(5)) * kSecond;
      all.add(random_below(2), t, known, random_below(300), static_cast<double>(random_below(100)) / 7);
    }
    const auto bulk = make(all, versions, false, as_known);
    const auto tiled = make(all, versions, true, as_known);
    Rows part = all;
    for (auto* column : {&part.time, &part.known}) column->resize(200);
    part.keys.resize(200);
    part.ids.resize(400);
    part.values.resize(200);
    const auto appended = make(part, versions, true, as_known);
    for (uint64_t key = 0; key < 2; ++key) CHECK(read(*appended, key, 30 * kSecond).status == 0);
    for (size_t at = 200; at < 400; at += 20) {
      Rows more;
      for (size_t i = at; i < at + 20; ++i) {
        more.add(all.keys[i], all.time[i], all.known[i], all.ids[2 * i], all.values[i]);
      }
      std::vector<Key128> keys;
      CHECK(appended->append(more.rows(versions), more.raw(), {{}}, &keys).is_ok());
    }
    for (int64_t now = -kSecond; now < 700 * kSecond; now += 7 * kSecond) {
      for (uint64_t key = 0; key < 3; ++key) {
        const Read expected = read(*bulk, key, now);
        CHECK(same(expected, read(*tiled, key, now)));
        CHECK(same(expected, read(*appended, key, now)));
      }
    }
  }
}

}  // namespace

int main() {
  for (const bool versions : {false, true}) {
    test_readers_and_an_appender(versions);
    for (const bool as_known : {false, true}) test_tiles_and_appends_change_no_bit(versions, as_known);
  }
  return 0;
}
