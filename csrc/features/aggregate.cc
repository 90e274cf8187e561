#include "features/aggregate.h"

#include <cmath>

#include "features/aggregate_exp2.h"

namespace penstock {

namespace {

uint64_t raw(int64_t value) {
  return static_cast<uint64_t>(value);
}

// Whether `value` is a new extreme; NaN wins and stays, -0.0 is below 0.0.
template <bool kLeast>
bool replaces(double value, double best) {
  if (std::isnan(best)) return false;
  if (std::isnan(value)) return true;
  if (value == best)
    return kLeast ? std::signbit(value) && !std::signbit(best) : !std::signbit(value) && std::signbit(best);
  return kLeast ? value < best : value > best;
}
template <bool kLeast>
bool replaces(int64_t value, int64_t best) {
  return kLeast ? value < best : value > best;
}

template <class F>
void each(const EventSlice& events, const uint8_t* valid, size_t from, size_t to, const EventCut& cut,
          F&& f) {
  if (valid == nullptr && cut.mode == EventCut::kAll) {
    for (size_t i = from; i < to; ++i) f(i);
    return;
  }
  for (size_t i = from; i < to; ++i) {
    if ((valid == nullptr || valid[i] != 0) && events.counts(i, cut)) f(i);
  }
}

void add_moment(double x, Word* p) {
  p[0].i += 1;
  const double delta = x - p[1].f;
  p[1].f += delta / static_cast<double>(p[0].i);
  p[2].f += delta * (x - p[1].f);
}

void merge_moments(int64_t n, double mean, double m2, Word* p) {
  if (n == 0) return;
  if (p[0].i == 0) {
    p[0].i = n;
    p[1].f = mean;
    p[2].f = m2;
    return;
  }
  const int64_t total = p[0].i + n;
  const double share = static_cast<double>(n) / static_cast<double>(total);
  const double delta = mean - p[1].f;
  p[2].f = p[2].f + m2 + delta * delta * (static_cast<double>(p[0].i) * share);
  p[1].f += delta * share;
  p[0].i = total;
}

double decay(int64_t since, int64_t until, double half_life) {
  return exp2_of(-(static_cast<double>(raw(until) - raw(since)) / half_life));
}

template <bool kLeast, class T>
void extreme(T value, T Word::* field, Word* p) {
  if (p[1].i == 0 || replaces<kLeast>(value, p[0].*field)) p[0].*field = value;
  p[1].i += 1;
}

template <bool kLeast, class T>
void merge_extremes(const Word* values, const Word* counts, size_t from, size_t to, T Word::* field,
                    Word* p) {
  for (size_t i = from; i < to; ++i) {
    if (counts[i].i == 0) continue;
    if (p[1].i == 0 || replaces<kLeast>(values[i].*field, p[0].*field)) p[0].*field = values[i].*field;
    p[1].i += counts[i].i;
  }
}

}  // namespace

uint32_t Fold::words() const {
  switch (kind) {
    case FoldKind::kCount:
    case FoldKind::kSumInt:
      return 1;
    case FoldKind::kMoments:
    case FoldKind::kEwma:
      return 3;
    case FoldKind::kSet:
      return 0;
    default:
      return 2;
  }
}

Fold fold_of(const Aggregate& a) {
  Fold fold;
  fold.value = a.value;
  fold.real = a.real;
  switch (a.kind) {
    case AggregateKind::kCount:
      fold.kind = FoldKind::kCount;
      break;
    case AggregateKind::kSum:
      fold.kind = a.real ? FoldKind::kSumReal : FoldKind::kSumInt;
      break;
    case AggregateKind::kMean:
      fold.kind = FoldKind::kSumReal;
      break;
    case AggregateKind::kMin:
      fold.kind = a.real ? FoldKind::kMinReal : FoldKind::kMinInt;
      break;
    case AggregateKind::kMax:
      fold.kind = a.real ? FoldKind::kMaxReal : FoldKind::kMaxInt;
      break;
    case AggregateKind::kVar:
    case AggregateKind::kStd:
      fold.kind = FoldKind::kMoments;
      break;
    case AggregateKind::kFirst:
      fold.kind = FoldKind::kFirst;
      break;
    case AggregateKind::kLast:
      fold.kind = FoldKind::kLast;
      break;
    case AggregateKind::kEwma:
      fold.kind = FoldKind::kEwma;
      fold.half_life = static_cast<double>(a.param);
      break;
    case AggregateKind::kDistinct:
    case AggregateKind::kTopK:
      fold.kind = FoldKind::kSet;
      break;
  }
  return fold;
}

void fold_identity(const Fold& fold, Word* partial) {
  // All-zero words: 0 and +0.0 alike.
  for (uint32_t w = 0; w < fold.words(); ++w) partial[w].i = 0;
}

void fold_events(const Fold& fold, const EventSlice& events, const ValueSlice& values, size_t from, size_t to,
                 const EventCut& cut, Word* p) {
  const Word* data = values.data;
  const bool real = fold.real;
  const auto value = [data, real](size_t i) { return real ? data[i].f : static_cast<double>(data[i].i); };
  const auto run = [&](auto&& f) { each(events, values.valid, from, to, cut, f); };
  switch (fold.kind) {
    case FoldKind::kCount:
      if (values.valid == nullptr && cut.mode == EventCut::kAll) {
        p[0].i += static_cast<int64_t>(to - from);
      } else {
        run([&](size_t) { ++p[0].i; });
      }
      break;
    case FoldKind::kSumInt:
      run([&](size_t i) { p[0].i = static_cast<int64_t>(raw(p[0].i) + raw(data[i].i)); });
      break;
    case FoldKind::kSumReal: {
      double sum = p[0].f;
      int64_t n = p[1].i;
      run([&](size_t i) {
        sum += value(i);
        ++n;
      });
      p[0].f = sum;
      p[1].i = n;
      break;
    }
    case FoldKind::kMinInt:
      run([&](size_t i) { extreme<true>(data[i].i, &Word::i, p); });
      break;
    case FoldKind::kMaxInt:
      run([&](size_t i) { extreme<false>(data[i].i, &Word::i, p); });
      break;
    case FoldKind::kMinReal:
      run([&](size_t i) { extreme<true>(data[i].f, &Word::f, p); });
      break;
    case FoldKind::kMaxReal:
      run([&](size_t i) { extreme<false>(data[i].f, &Word::f, p); });
      break;
    case FoldKind::kMoments:
      run([&](size_t i) { add_moment(value(i), p); });
      break;
    case FoldKind::kFirst:
      for (size_t i = from; i < to && p[1].i == 0; ++i) {
        if ((values.valid != nullptr && values.valid[i] == 0) || !events.counts(i, cut)) continue;
        p[0] = data[i];
        p[1].i = 1;
      }
      break;
    case FoldKind::kLast:
      for (size_t i = to; i > from; --i) {
        if ((values.valid != nullptr && values.valid[i - 1] == 0) || !events.counts(i - 1, cut)) continue;
        p[0] = data[i - 1];
        p[1].i = 1;
        break;
      }
      break;
    case FoldKind::kEwma:
      run([&](size_t i) {
        if (p[1].f > 0.0) {
          const double keep = decay(p[2].i, events.time[i], fold.half_life);
          p[0].f = p[0].f * keep + value(i);
          p[1].f = p[1].f * keep + 1.0;
        } else {
          p[0].f = value(i);
          p[1].f = 1.0;
        }
        p[2].i = events.time[i];
      });
      break;
    case FoldKind::kSet:
      break;
  }
}

void fold_partials(const Fold& fold, const Word* const* columns, size_t from, size_t to, Word* p) {
  const Word* a = columns[0];
  const Word* b = fold.words() > 1 ? columns[1] : nullptr;
  const Word* c = fold.words() > 2 ? columns[2] : nullptr;
  switch (fold.kind) {
    case FoldKind::kCount:
    case FoldKind::kSumInt: {
      uint64_t sum = raw(p[0].i);
      for (size_t i = from; i < to; ++i) sum += raw(a[i].i);
      p[0].i = static_cast<int64_t>(sum);
      break;
    }
    case FoldKind::kSumReal: {
      // An empty part adds +0.0, which changes no bit: a sum that starts from +0.0 is never -0.0.
      double sum = p[0].f;
      int64_t n = p[1].i;
      for (size_t i = from; i < to; ++i) {
        sum += a[i].f;
        n += b[i].i;
      }
      p[0].f = sum;
      p[1].i = n;
      break;
    }
    case FoldKind::kMinInt:
      merge_extremes<true>(a, b, from, to, &Word::i, p);
      break;
    case FoldKind::kMaxInt:
      merge_extremes<false>(a, b, from, to, &Word::i, p);
      break;
    case FoldKind::kMinReal:
      merge_extremes<true>(a, b, from, to, &Word::f, p);
      break;
    case FoldKind::kMaxReal:
      merge_extremes<false>(a, b, from, to, &Word::f, p);
      break;
    case FoldKind::kMoments: {
      Word own[3] = {p[0], p[1], p[2]};
      for (size_t i = from; i < to; ++i) merge_moments(a[i].i, b[i].f, c[i].f, own);
      p[0] = own[0], p[1] = own[1], p[2] = own[2];
      break;
    }
    case FoldKind::kFirst:
      for (size_t i = from; i < to && p[1].i == 0; ++i) {
        if (b[i].i != 0) p[0] = a[i], p[1].i = 1;
      }
      break;
    case FoldKind::kLast:
      for (size_t i = to; i > from; --i) {
        if (b[i - 1].i == 0) continue;
        p[0] = a[i - 1];
        p[1].i = 1;
        break;
      }
      break;
    case FoldKind::kEwma: {
      double sum = p[0].f, weight = p[1].f;
      int64_t newest = p[2].i;
      for (size_t i = from; i < to; ++i) {
        if (!(b[i].f > 0.0)) continue;
        if (weight > 0.0) {
          const double keep = decay(newest, c[i].i, fold.half_life);
          sum = sum * keep + a[i].f;
          weight = weight * keep + b[i].f;
        } else {
          sum = a[i].f;
          weight = b[i].f;
        }
        newest = c[i].i;
      }
      p[0].f = sum;
      p[1].f = weight;
      p[2].i = newest;
      break;
    }
    case FoldKind::kSet:
      break;
  }
}

Word fold_result(const Aggregate& aggregate, const Word* p, bool* valid) {
  Word out;
  out.i = 0;
  *valid = true;
  const auto real = [&](double value) {
    out.f = std::isnan(value) ? std::numeric_limits<double>::quiet_NaN() : value;
  };
  switch (aggregate.kind) {
    case AggregateKind::kCount:
      out = p[0];
      break;
    case AggregateKind::kSum:
      if (aggregate.real) {
        real(p[0].f);
      } else {
        out = p[0];
      }
      break;
    case AggregateKind::kMean:
      if ((*valid = p[1].i > 0)) real(p[0].f / static_cast<double>(p[1].i));
      break;
    case AggregateKind::kVar:
    case AggregateKind::kStd:
      if ((*valid = p[0].i > aggregate.param)) {
        const double var = p[2].f / static_cast<double>(p[0].i - aggregate.param);
        real(aggregate.kind == AggregateKind::kVar ? var : std::sqrt(var));
      }
      break;
    case AggregateKind::kEwma:
      if ((*valid = p[1].f > 0.0)) real(p[0].f / p[1].f);
      break;
    default:  // min, max, first, last
      if (!(*valid = p[1].i > 0)) break;
      if (aggregate.real) {
        real(p[0].f);
      } else {
        out = p[0];
      }
      break;
  }
  return out;
}

}  // namespace penstock
