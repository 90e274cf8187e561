// The events of a view by key, and the one function that computes its stored rows at any time.
//
// The source's arrays are referenced, not copied: the owner keeps them alive. Rows that come later are
// appended (append): they go into storage of the table's own, and each key that they touch gets a history of
// its own. A plain feature is its expression on the newest event of the key; an aggregate is folded over the
// events of a window (aggregate.h) with the help of stored tiles (event_tiles.h), which change no bit.
//
// Any thread may read while one appends: a read holds a shared lock for each block of 64 rows, an append
// holds the exclusive lock once, so a row sees all of an append or nothing of it. Appends exclude one
// another.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "base/status.h"
#include "features/aggregate.h"
#include "features/aggregate_sets.h"
#include "features/event_history.h"
#include "features/event_index.h"
#include "features/event_tiles.h"
#include "features/event_window.h"
#include "features/program.h"

namespace penstock {

// A column of a source: 8-byte or, for float32, 4-byte values; `valid` is null where nothing is.
struct RawColumn {
  const void* values = nullptr;
  bool narrow = false;
  const bool* valid = nullptr;

  // Writes the value, zero where null; false for null.
  bool read(size_t row, Word* out) const;
};

// One stored feature: output `at` of the plain program, or aggregate `at`.
struct StoredFeature {
  bool aggregate = false;
  uint32_t at = 0;
};

struct ViewSpec {
  std::shared_ptr<const FeatureProgram> plain;   // null: no plain feature
  std::vector<uint32_t> plain_inputs;            // raw column of each of its inputs
  std::shared_ptr<const FeatureProgram> values;  // null: no aggregate of a value
  std::vector<uint32_t> value_inputs;
  std::vector<bool> value_texts;  // of each value column: its words are codes of texts
  std::vector<Window> windows;    // `group` is set by create()
  std::vector<Aggregate> aggregates;
  std::vector<StoredFeature> features;
  int64_t ttl = 0;   // 0: none
  int64_t tick = 0;  // above 0: all windows move at multiples of it or rarer ones, and nothing else moves
  bool as_known = false;  // only events known by the request time count, for plain features too
  bool store_tiles = true;
};

enum RowStatus : uint8_t { kRowPresent = 0, kRowNotFound = 2, kRowExpired = 3, kRowFuture = 4 };

struct RowsAsked {
  size_t n = 0;
  const uint64_t* keys = nullptr;  // [n, 2]
  const int64_t* now = nullptr;
  const bool* nulls = nullptr;        // null: none
  const int64_t* known_by = nullptr;  // null: no cut
};

// Columns in the order of ViewSpec::features; meta is [n, 4]: valid from, valid until, event time, known-at.
struct RowsFound {
  uint8_t* status = nullptr;
  int64_t* meta = nullptr;
  std::vector<Word*> values;
  std::vector<bool*> valid;
};

class EventTable {
 public:
  EventTable(const EventTable&) = delete;
  EventTable& operator=(const EventTable&) = delete;

  // `raw` are the columns that the programs read; `texts` the texts of each value column with codes.
  static Status create(ViewSpec spec, const EventRows& rows, std::vector<RawColumn> raw,
                       std::vector<std::vector<std::string>> texts, unsigned threads,
                       std::unique_ptr<EventTable>* out);

  void rows_at(const RowsAsked& asked, const RowsFound& found, unsigned threads) const;
  // Adds rows behind those that are there; `texts` are new ones, behind the old. Writes the distinct keys
  // of the rows.
  Status append(const EventRows& rows, const std::vector<RawColumn>& raw,
                const std::vector<std::vector<std::string>>& texts, std::vector<Key128>* keys);
  // Forgets the events of a key; false if it has none.
  bool erase(Key128 key);
  // Keys whose row may differ between the two times: all that do are among them.
  void changed_keys(int64_t start, int64_t end, std::vector<Key128>* keys) const;
  void keys(std::vector<Key128>* keys) const;
  size_t n_events() const;
  size_t n_keys() const;
  size_t n_features() const { return spec_.features.size(); }
  // One row of the source for each key that it has events of, but erased ones.
  void source_rows(std::vector<int64_t>* rows) const;
  // The time of the newest event by `now` of keys [n, 2], as far as it counts without a cut, or kTimeMin.
  void newest_events(const uint64_t* keys, size_t n, int64_t now, int64_t* times) const;

 private:
  static constexpr size_t kChunkRows = 1024;
  struct Chunk {
    std::vector<Word> values;  // by column, row
    std::vector<uint8_t> valid;
  };
  struct RowOrder {
    size_t row;       // of what is asked
    uint32_t number;  // of its key, then the row of its newest event; kNoKey for none
  };
  struct Found;    // where the events of a row's key lie
  struct Scratch;  // of one thread

  EventTable() = default;
  Status check(const ViewSpec& spec, size_t n_raw) const;
  void fold_values(unsigned threads);
  void collect_points();
  template <class Rows, class Read>
  static void evaluate(const FeatureProgram& program, const std::vector<uint32_t>& inputs, size_t n,
                       const Rows& row, const Read& read, Scratch* scratch);
  bool read_raw(uint32_t column, uint32_t row, Word* out) const;
  uint32_t find(Key128 key) const;
  void locate(uint32_t key, Found* found) const;
  const TileSet* tiles(const Found& found, const Window& window) const;
  void number_rows(const RowsAsked& asked, size_t from, size_t n, uint32_t* numbers) const;
  void locate_block(const RowsAsked& asked, const RowsFound& out, const RowOrder* order, size_t n,
                    uint32_t* newest_rows, Scratch* scratch) const;
  void gather_block(const RowsFound& out, const RowOrder* order, size_t n, Scratch* scratch) const;
  void rows_range(const RowsAsked& asked, const RowsFound& found, size_t from, size_t n,
                  Scratch* scratch) const;
  uint8_t newest(const Found& found, size_t after, int64_t now, const int64_t* known_by, size_t* at,
                 Interval* interval, int64_t* meta) const;
  void aggregate_row(const Found& found, int64_t now, const int64_t* known_by, const RowsFound& out,
                     size_t row, Interval* interval, Scratch* scratch) const;
  bool read_set(const Found& found, uint32_t aggregate, const EventCut& cut, const TileSet* stored,
                Scratch* scratch, Word* value) const;
  bool may_differ(const Found& found, int64_t start, int64_t end) const;
  std::unique_ptr<History> open_history(uint32_t key) const;

  ViewSpec spec_;
  std::vector<Fold> folds_;         // of each aggregate, with its words in the tiles of its group
  std::vector<uint32_t> first_of_;  // of each aggregate, the first of its window that reads the same fold
  std::vector<uint32_t> sets_;      // of each aggregate of a set of values, which of its group's it reads
  std::vector<TileGroup> groups_;
  std::vector<std::vector<uint32_t>> by_window_;  // aggregates of each window
  HistoryShape shape_;
  EventIndex base_;
  EventRows rows_;  // the source's arrays
  std::vector<RawColumn> raw_;
  std::vector<std::vector<Word>> values_;          // value columns in index order
  std::vector<std::vector<uint8_t>> value_valid_;  // empty where nothing is null
  std::vector<int64_t> points_;
  std::vector<size_t> point_starts_;
  std::unique_ptr<TileSlots> base_tiles_;  // [key, group]

  std::mutex appending_;
  mutable std::mutex turn_;  // held by a writer that waits, so that readers do not starve it
  mutable std::shared_mutex lock_;
  // Guarded by lock_:
  KeyMap more_keys_;
  std::vector<std::unique_ptr<History>> histories_;  // by key; null: the index holds its events
  std::vector<std::unique_ptr<Chunk>> chunks_;
  size_t n_appended_ = 0;
  std::vector<std::vector<std::string>> texts_;
  std::vector<std::vector<uint64_t>> text_hashes_;
  std::vector<ValueDomain> domains_;
};

}  // namespace penstock
