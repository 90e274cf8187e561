// Counts against a linear scan, merge against the whole, refused specs.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "../check.h"
#include "base/cpu.h"
#include "drift/edge_search.h"
#include "drift/histogram.h"

using penstock::HistogramColumn;
using penstock::HistogramCounts;
using penstock::HistogramSpec;

// Every search path against a count, for every number of edges around the sizes of lines and blocks.
void searches_agree() {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  std::mt19937 random(11);
  const auto best = static_cast<int>(penstock::detected_cpu_level());
  for (const size_t n : {0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 511, 512, 513, 1279, 1280, 1281, 5000}) {
    std::vector<float> edges(n);
    for (size_t i = 0; i < n; ++i)
      edges[i] = static_cast<float>(i) - 40.0f + static_cast<float>(random() % 9) / 10;
    std::vector<float> values = {kInf, -kInf, 0.0f, -0.0f, std::numeric_limits<float>::max()};
    for (int i = 0; i < 300 && n > 0; ++i) {
      const float edge = edges[random() % n];
      values.insert(values.end(), {edge, std::nextafter(edge, kInf), std::nextafter(edge, -kInf)});
    }
    std::vector<penstock::EdgeLine> lines;
    const size_t pivots = penstock::EdgeIndex::append(edges.data(), n, &lines);
    const penstock::EdgeIndex index{lines.data(), pivots, lines.data() + pivots, edges.data(), n};
    for (int level = 0; level <= best; ++level) {
      CHECK(penstock::force_cpu_level(static_cast<penstock::CpuLevel>(level)) ==
            static_cast<penstock::CpuLevel>(level));
      std::vector<uint32_t> below(values.size() + 1, 77);
      penstock::edge_search()(index, values.data(), values.size(), below.data());
      for (size_t i = 0; i < values.size(); ++i) {
        const auto expected = static_cast<uint32_t>(
            std::count_if(edges.begin(), edges.end(), [&](float edge) { return edge < values[i]; }));
        CHECK(below[i] == expected);
      }
      CHECK(below.back() == 77);  // nothing beyond the last is written
      const float nan = std::numeric_limits<float>::quiet_NaN();
      penstock::edge_search()(index, &nan, 1, below.data());
      CHECK(below[0] <= n);
    }
  }
}

int main() {
  searches_agree();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::vector<float> edges = {-1.5f, 0.0f, 1.0f, std::nextafter(1.0f, 2.0f), 7.0f};
  std::shared_ptr<const HistogramSpec> spec;
  CHECK(HistogramSpec::create({{edges, 0}, {{}, 3}, {{}, 0}}, &spec).is_ok());
  CHECK(spec->n_slots() == 10 + 7 + 5);

  std::vector<float> pool = {-0.0f, 0.0f, nan, kInf, -kInf, 0.5f, 1.0f, 2.0f, 3.0f, 1e30f, -1e30f};
  for (float e : edges) {
    pool.insert(pool.end(), {e, std::nextafter(e, kInf), std::nextafter(e, -kInf)});
  }
  std::mt19937 random(7);
  constexpr size_t kRows = 500;
  std::vector<float> rows(kRows * 3);
  for (float& v : rows) v = pool[random() % pool.size()];

  std::vector<uint64_t> expected(spec->n_slots(), 0);
  for (size_t i = 0; i < rows.size(); ++i) {
    const float v = rows[i];
    const size_t j = i % 3, n_bins = spec->n_bins(j), at = spec->offset(j);
    if (std::isnan(v)) {
      ++expected[at + n_bins];
    } else if (j == 1) {
      ++expected[v == 0 ? at : v == 1 ? at + 1 : v == 2 ? at + 2 : at + 4];
    } else {
      size_t bin = 0;
      while (bin < n_bins - 1 && spec->edges(j)[bin] < v) ++bin;
      ++expected[at + bin];
      if (std::isinf(v)) ++expected[at + n_bins + (v < 0 ? 2 : 3)];
    }
  }
  HistogramCounts whole(spec), left(spec), right(spec);
  whole.count(rows.data(), kRows, 3);
  CHECK(whole.counts() == expected);
  left.count(rows.data(), 123, 3);
  right.count(rows.data() + 123 * 3, kRows - 123, 3);
  CHECK(left.merge(right).is_ok());
  CHECK(left.counts() == expected);
  left.clear();
  CHECK(left.counts() == std::vector<uint64_t>(spec->n_slots(), 0));

  std::shared_ptr<const HistogramSpec> other;
  CHECK(HistogramSpec::create({{edges, 0}}, &other).is_ok());
  HistogramCounts foreign(other);
  CHECK(!whole.merge(foreign).is_ok());
  CHECK(whole.counts() == expected);

  std::shared_ptr<const HistogramSpec> none;
  CHECK(!HistogramSpec::create({{{1.0f, 1.0f}, 0}}, &none).is_ok());
  CHECK(!HistogramSpec::create({{{1.0f, kInf}, 0}}, &none).is_ok());
  CHECK(!HistogramSpec::create({{{nan}, 0}}, &none).is_ok());
  CHECK(!HistogramSpec::create({{{1.0f}, 2}}, &none).is_ok());
  CHECK(!HistogramSpec::create({{{}, HistogramSpec::kMaxCodes + 1}}, &none).is_ok());
  CHECK(none == nullptr);
  return 0;
}
