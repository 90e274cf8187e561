// Drift counts of served rows by pane of request time: what DriftMonitor reports on.
//
// Pane p holds the request times [p * pane_us, (p + 1) * pane_us) and lives in slot p % panes. A slot goes
// only forward: the highest pane ever seen there stays, so what is held does not depend on how the rows were
// split over calls, and one row with a time far ahead takes one slot, not the whole ring.
//
// Invariants: every row that came is held, expired (its pane left the ring) or late (its pane had left
// before it came): rows == held + expired + late. Counts are integers, so any split of the rows, in order,
// gives equal windows. A pane's counts are as narrow as its fullest slot allows, within a factor of two.
// Threads: any; one lock, held while rows are counted, so callers pass short runs of rows. Memory is taken
// when a pane begins or widens, from panes that left where that fits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "base/status.h"
#include "drift/histogram.h"

namespace penstock {

class DriftPanes {
 public:
  // score: one column. window_us: a multiple of pane_us.
  static Status create(std::shared_ptr<const HistogramSpec> inputs,
                       std::shared_ptr<const HistogramSpec> score, int64_t pane_us, int64_t window_us,
                       std::shared_ptr<DriftPanes>* out);

  // Adds n rows: request time now_us[i] >= 0, inputs at rows + i * row_stride, first score at
  // scores[i * score_stride]. Returns how many were late.
  size_t add(const int64_t* now_us, const float* rows, size_t row_stride, const double* scores,
             size_t score_stride, size_t n);

  // Adds what the other holds, pane by pane; what of it is older than what this one holds expires. Refused,
  // unchanged, unless bins, pane and window are the same.
  Status merge(DriftPanes& other);

  struct Window {
    int64_t last = -1;                         // its last pane; -1 where none was given and none is held
    uint64_t n = 0;                            // rows in the window
    uint64_t rows = 0, late = 0, expired = 0;  // since the start
  };
  // Adds the counts of the `panes` panes up to `last` (none: the newest held) to inputs and score, which have
  // the slots of the two specs.
  Window window(std::optional<int64_t> last, int64_t panes, uint64_t* inputs, uint64_t* score);

  const HistogramSpec& inputs() const { return *inputs_; }
  const HistogramSpec& score() const { return *score_; }
  int64_t pane_us() const { return pane_us_; }
  int64_t window_us() const { return pane_us_ * static_cast<int64_t>(panes_.size()); }

 private:
  // One of the three vectors is in use.
  struct Counts {
    std::vector<uint16_t> narrow;
    std::vector<uint32_t> middle;
    std::vector<uint64_t> wide;
  };
  struct Pane {
    int64_t number = -1;
    uint64_t rows = 0;
    uint64_t bound = 0;  // no slot holds more
    Counts counts;
  };

  DriftPanes(std::shared_ptr<const HistogramSpec> inputs, std::shared_ptr<const HistogramSpec> score,
             int64_t pane_us, size_t panes);

  Pane* admit(int64_t number);  // null: late
  void begin(Pane& pane, int64_t number);
  void reserve(Pane& pane, uint64_t n);
  void count(Pane& pane, const float* rows, size_t row_stride, const double* scores, size_t score_stride,
             size_t n);
  void add_to(const Pane& pane, uint64_t* inputs, uint64_t* score) const;

  const std::shared_ptr<const HistogramSpec> inputs_, score_;
  const int64_t pane_us_;
  const size_t n_inputs_, n_slots_;  // slots of the inputs, and of both
  std::mutex mutex_;
  std::vector<Pane> panes_;
  uint64_t rows_ = 0, late_ = 0, expired_ = 0;
};

}  // namespace penstock
