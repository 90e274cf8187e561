// The partial results of window aggregates: how an event is folded in, how two partials are combined, and
// what a partial says in the end. They are the meaning of an aggregate; whoever stores partials changes no
// bit.
//
// A partial is a few 64-bit words. Events are folded in event order; partials are combined from left to
// right; a partial of no event is the identity. Sums are float64 or int64 modulo 2^64, variance is (n, mean,
// M2) by Welford's update and Chan's merge, and ewma decays by exp2_of() between one event and the next. Pure
// functions; any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

namespace penstock {

constexpr int64_t kTimeMin = std::numeric_limits<int64_t>::min();
constexpr int64_t kTimeMax = std::numeric_limits<int64_t>::max();

// Numbers are those of penstock.features.aggregates.KINDS.
enum class AggregateKind : uint8_t {
  kCount,
  kSum,
  kMean,
  kMin,
  kMax,
  kVar,
  kStd,
  kFirst,
  kLast,
  kEwma,
  kDistinct,
  kTopK,
};
constexpr uint8_t kAggregateKinds = 12;

union Word {
  double f;
  int64_t i;
};

// Which events count: all of them, those that no later version replaces, or those known by a time.
struct EventCut {
  enum Mode : uint8_t { kAll, kLive, kKnown } mode = kAll;
  int64_t by = kTimeMax;
};

// One value column over the events of a key. `valid` is null where nothing is.
struct ValueSlice {
  const Word* data;
  const uint8_t* valid;
};

// The events of one key in event order. `superseded` is null where no event has versions; an entry is the
// known-at of the version that replaces the event, or kTimeMax.
struct EventSlice {
  size_t n = 0;
  const int64_t* time = nullptr;
  const int64_t* known = nullptr;
  const int64_t* superseded = nullptr;
  const uint32_t* row = nullptr;

  bool counts(size_t i, const EventCut& cut) const {
    if (cut.mode == EventCut::kAll) return true;
    if (cut.mode == EventCut::kLive) return superseded[i] == kTimeMax;
    return known[i] <= cut.by && known[i] != kTimeMin &&
           (superseded == nullptr || superseded[i] == kTimeMax || superseded[i] > cut.by);
  }
};

enum class FoldKind : uint8_t {
  kCount,    // n
  kSumInt,   // sum
  kSumReal,  // sum, n
  kMinInt,   // value, n
  kMinReal,
  kMaxInt,
  kMaxReal,
  kMoments,  // n, mean, M2
  kFirst,    // value, n
  kLast,
  kEwma,  // sum of weighted values, of weights, time of the newest event
  kSet,   // kept apart: see aggregate_sets.h
};

struct Fold {
  FoldKind kind = FoldKind::kCount;
  int32_t value = -1;  // value column; -1 counts events
  bool real = false;   // the column holds doubles
  double half_life = 0;
  uint32_t offset = 0;  // of its words in a partial of several folds

  uint32_t words() const;
  bool same_as(const Fold& other) const {
    return kind == other.kind && value == other.value && half_life == other.half_life;
  }
};

struct Aggregate {
  AggregateKind kind = AggregateKind::kCount;
  int32_t value = -1;
  bool real = false;
  uint32_t window = 0;
  int64_t param = 0;  // ddof, rank, exact bound, or half-life in microseconds
};

// The fold that an aggregate reads.
Fold fold_of(const Aggregate& aggregate);

constexpr uint32_t kMaxFoldWords = 3;
// Writes the identity.
void fold_identity(const Fold& fold, Word* partial);
// Folds the events [from, to) that count.
void fold_events(const Fold& fold, const EventSlice& events, const ValueSlice& values, size_t from, size_t to,
                 const EventCut& cut, Word* partial);
// partial = partial combined with each of parts [from, to); word w of part i is columns[w][i].
void fold_partials(const Fold& fold, const Word* const* columns, size_t from, size_t to, Word* partial);
// The aggregate's value, zero where null; one NaN, whatever made it.
Word fold_result(const Aggregate& aggregate, const Word* partial, bool* valid);

}  // namespace penstock
