#include "drift/drift_panes.h"

#include <algorithm>
#include <string>
#include <utility>

namespace penstock {
namespace {

constexpr size_t kRun = 256;  // rows counted at once: they and one column's edges fit the first-level cache

template <class F>
void with_counts(auto& counts, F&& f) {
  if (!counts.wide.empty()) {
    f(counts.wide);
  } else if (!counts.middle.empty()) {
    f(counts.middle);
  } else {
    f(counts.narrow);
  }
}

}  // namespace

Status DriftPanes::create(std::shared_ptr<const HistogramSpec> inputs,
                          std::shared_ptr<const HistogramSpec> score, int64_t pane_us, int64_t window_us,
                          std::shared_ptr<DriftPanes>* out) {
  if (pane_us < 1) return Status::invalid("pane_us is " + std::to_string(pane_us) + "; expected at least 1");
  if (window_us < pane_us || window_us % pane_us != 0) {
    return Status::invalid("window_us is " + std::to_string(window_us) +
                           "; expected a multiple of pane_us (" + std::to_string(pane_us) + ")");
  }
  if (score->n_columns() != 1) {
    return Status::invalid("score has " + std::to_string(score->n_columns()) + " columns; expected 1");
  }
  out->reset(
      new DriftPanes(std::move(inputs), std::move(score), pane_us, static_cast<size_t>(window_us / pane_us)));
  return Status::ok();
}

DriftPanes::DriftPanes(std::shared_ptr<const HistogramSpec> inputs,
                       std::shared_ptr<const HistogramSpec> score, int64_t pane_us, size_t panes)
    : inputs_(std::move(inputs)),
      score_(std::move(score)),
      pane_us_(pane_us),
      n_inputs_(inputs_->n_slots()),
      n_slots_(n_inputs_ + score_->n_slots()),
      panes_(panes) {}

// Takes the slot for a later pane; what was there has left the ring.
void DriftPanes::begin(Pane& pane, int64_t number) {
  expired_ += pane.rows;
  pane.number = number;
  pane.rows = pane.bound = 0;
  pane.counts.middle = {};
  pane.counts.wide = {};
  pane.counts.narrow.assign(n_slots_, 0);
}

DriftPanes::Pane* DriftPanes::admit(int64_t number) {
  Pane& pane = panes_[static_cast<size_t>(number) % panes_.size()];
  if (number < pane.number) return nullptr;
  if (number > pane.number) begin(pane, number);
  return &pane;
}

// Makes room for n more in every slot. Counts widen only when the fullest slot comes near the limit.
void DriftPanes::reserve(Pane& pane, uint64_t n) {
  const auto widen = [&](auto& from, auto& to) {
    using From = typename std::decay_t<decltype(from)>::value_type;
    constexpr uint64_t kLimit = static_cast<From>(-1);
    if (from.empty() || pane.bound + n <= kLimit) return;
    pane.bound = *std::max_element(from.begin(), from.end());
    if (pane.bound + n <= kLimit / 2) return;
    to.assign(from.begin(), from.end());
    from = {};
  };
  widen(pane.counts.narrow, pane.counts.middle);
  widen(pane.counts.middle, pane.counts.wide);
  pane.bound += n;
}

void DriftPanes::count(Pane& pane, const float* rows, size_t row_stride, const double* scores,
                       size_t score_stride, size_t n) {
  reserve(pane, n);
  float column[kRun];
  for (size_t i = 0; i < n; ++i) column[i] = static_cast<float>(scores[i * score_stride]);  // or infinite
  with_counts(pane.counts, [&](auto& counts) {
    count_rows(*inputs_, rows, n, row_stride, counts.data());
    count_rows(*score_, column, n, 1, counts.data() + n_inputs_);
  });
  pane.rows += n;
}

size_t DriftPanes::add(const int64_t* now_us, const float* rows, size_t row_stride, const double* scores,
                       size_t score_stride, size_t n) {
  const std::lock_guard lock(mutex_);
  size_t late = 0;
  for (size_t i = 0; i < n;) {
    const int64_t number = now_us[i] / pane_us_;
    const int64_t start = number * pane_us_;
    size_t end = i + 1;
    while (end < n && end - i < kRun &&
           static_cast<uint64_t>(now_us[end] - start) < static_cast<uint64_t>(pane_us_)) {
      ++end;
    }
    if (Pane* pane = admit(number); pane != nullptr) {
      count(*pane, rows + i * row_stride, row_stride, scores + i * score_stride, score_stride, end - i);
    } else {
      late += end - i;
    }
    i = end;
  }
  rows_ += n;
  late_ += late;
  return late;
}

void DriftPanes::add_to(const Pane& pane, uint64_t* inputs, uint64_t* score) const {
  with_counts(pane.counts, [&](const auto& counts) {
    for (size_t i = 0; i < n_inputs_; ++i) inputs[i] += counts[i];
    for (size_t i = n_inputs_; i < n_slots_; ++i) score[i - n_inputs_] += counts[i];
  });
}

Status DriftPanes::merge(DriftPanes& other) {
  if (!inputs_->same_as(*other.inputs_) || !score_->same_as(*other.score_)) {
    return Status::invalid("other has another reference; expected the same inputs and bins");
  }
  const std::pair<const char*, int64_t (DriftPanes::*)() const> widths[] = {
      {"pane_us", &DriftPanes::pane_us}, {"window_us", &DriftPanes::window_us}};
  for (const auto& [name, get] : widths) {
    const int64_t mine = (this->*get)();
    const int64_t theirs = (other.*get)();
    if (mine != theirs) {
      return Status::invalid("other has " + std::string(name) + " " + std::to_string(theirs) + "; expected " +
                             std::to_string(mine));
    }
  }
  std::unique_lock mine(mutex_, std::defer_lock), theirs(other.mutex_, std::defer_lock);
  if (&other == this) {
    mine.lock();
  } else {
    std::lock(mine, theirs);
  }
  rows_ += other.rows_;
  late_ += other.late_;
  expired_ += other.expired_;
  std::vector<uint64_t> counts(n_slots_);
  for (const Pane& pane : other.panes_) {
    if (pane.number < 0) continue;
    const uint64_t rows = pane.rows;
    const uint64_t bound = pane.bound;
    Pane* into = admit(pane.number);
    if (into == nullptr) {
      expired_ += rows;
      continue;
    }
    std::fill(counts.begin(), counts.end(), 0);
    add_to(pane, counts.data(), counts.data() + n_inputs_);
    reserve(*into, bound);
    into->rows += rows;
    with_counts(into->counts, [&](auto& held) {
      using Count = typename std::decay_t<decltype(held)>::value_type;
      for (size_t i = 0; i < n_slots_; ++i) held[i] = static_cast<Count>(held[i] + counts[i]);
    });
  }
  return Status::ok();
}

DriftPanes::Window DriftPanes::window(std::optional<int64_t> last, int64_t panes, uint64_t* inputs,
                                      uint64_t* score) {
  const std::lock_guard lock(mutex_);
  Window found;
  found.rows = rows_;
  found.late = late_;
  found.expired = expired_;
  if (last.has_value()) {
    found.last = *last;
  } else {
    for (const Pane& pane : panes_) found.last = std::max(found.last, pane.number);
  }
  for (const Pane& pane : panes_) {
    if (pane.number < 0 || pane.number > found.last || pane.number <= found.last - panes) continue;
    found.n += pane.rows;
    add_to(pane, inputs, score);
  }
  return found;
}

}  // namespace penstock
