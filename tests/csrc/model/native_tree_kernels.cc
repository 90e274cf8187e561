// Random forests of many shapes against an oracle that walks the splits with float comparisons: the same
// leaves and the same score bits on every CPU level, for every batch size, with missing values, infinities,
// zeros of both signs, and values that tie with thresholds.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../check.h"
#include "base/cpu.h"
#include "model/tree_ensemble.h"

using namespace penstock;

namespace {

using Rng = std::mt19937;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

uint32_t crc32(const uint8_t* data, size_t size) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1u ? 0xedb88320u : 0u);
  }
  return ~crc;
}

struct Shape {
  const char* name;
  uint32_t n_features, n_trees, leaves_min, leaves_max, n_outputs;
  uint32_t grid;       // thresholds are multiples of 1/8 in a range of so many; 0: any normal float
  double categorical;  // share of the splits
  double skew;         // chance that all but one leaf go to one side
  bool vector_leaves;
};

struct Forest {
  Shape shape;
  std::vector<Split> splits;
  std::vector<uint32_t> split_begin{0}, leaf_begin{0};
  std::vector<int32_t> outputs;
  std::vector<double> values, base;
  std::vector<uint32_t> sets;
};

bool chance(Rng& rng, double p) {
  return std::uniform_real_distribution<double>(0, 1)(rng) < p;
}

float threshold(Rng& rng, const Shape& shape) {
  if (chance(rng, 0.01)) return chance(rng, 0.5) ? kInfinity : -kInfinity;
  if (shape.grid == 0) return std::normal_distribution<float>()(rng);
  const auto step = static_cast<int>(rng() % shape.grid) - static_cast<int>(shape.grid / 2);
  return step == 0 && chance(rng, 0.5) ? -0.0f : static_cast<float>(step) / 8.0f;
}

// Appends a subtree of n leaves in preorder; returns its node.
int32_t grow(Rng& rng, Forest& forest, uint32_t n, uint32_t* leaf) {
  if (n == 1) return ~static_cast<int32_t>((*leaf)++);
  const size_t at = forest.splits.size();
  Split split{};
  split.feature = rng() % forest.shape.n_features;
  split.flags = rng() % 2 * kDefaultLeft;
  if (chance(rng, forest.shape.categorical)) {
    split.flags |= kCategorical | rng() % 2 * kMatchLeft | rng() % 2 * kTruncateToZero;
    split.cat_begin = rng() % static_cast<uint32_t>(forest.sets.size() - 2);
    split.cat_count = 1 + rng() % 2;
  } else {
    split.threshold = threshold(rng, forest.shape);
  }
  forest.splits.push_back(split);
  uint32_t left = 1 + rng() % (n - 1);
  if (chance(rng, forest.shape.skew)) left = rng() % 2 ? 1 : n - 1;
  const uint32_t first = forest.split_begin.back();
  const int32_t low = grow(rng, forest, left, leaf);
  forest.splits[at].left = low;
  forest.splits[at].right = grow(rng, forest, n - left, leaf);
  return static_cast<int32_t>(at - first);
}

Forest make(Rng& rng, const Shape& shape) {
  Forest forest;
  forest.shape = shape;
  if (shape.categorical > 0) {
    for (int i = 0; i < 12; ++i) forest.sets.push_back(static_cast<uint32_t>(rng()));
  }
  for (uint32_t k = 0; k < shape.n_outputs; ++k) forest.base.push_back(0.25 * k);
  for (uint32_t t = 0; t < shape.n_trees; ++t) {
    const uint32_t n = shape.leaves_min + rng() % (shape.leaves_max - shape.leaves_min + 1);
    uint32_t leaf = 0;
    grow(rng, forest, n, &leaf);
    forest.split_begin.push_back(static_cast<uint32_t>(forest.splits.size()));
    forest.leaf_begin.push_back(forest.leaf_begin.back() + n);
    const bool vector = shape.vector_leaves && rng() % 2;
    forest.outputs.push_back(vector ? -1 : static_cast<int32_t>(rng() % shape.n_outputs));
    for (uint32_t i = 0; i < n * (vector ? shape.n_outputs : 1); ++i) {
      forest.values.push_back(std::normal_distribution<double>()(rng) * std::pow(10.0, int(rng() % 9) - 4));
    }
  }
  return forest;
}

template <class T>
void put(std::vector<uint8_t>& file, const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  file.insert(file.end(), bytes, bytes + values.size() * sizeof(T));
}

std::shared_ptr<const TreeEnsemble> load(const Forest& forest) {
  TreeHeader h{};
  std::memcpy(h.magic, kTreeMagic, 8);
  h.version = kTreeVersion;
  h.n_features = forest.shape.n_features, h.n_outputs = forest.shape.n_outputs;
  h.n_trees = forest.shape.n_trees, h.n_splits = static_cast<uint32_t>(forest.splits.size());
  h.n_leaves = forest.leaf_begin.back(), h.n_leaf_values = static_cast<uint32_t>(forest.values.size());
  h.n_cat_words = static_cast<uint32_t>(forest.sets.size());
  h.alpha = 1.0;
  std::vector<uint8_t> body;
  put(body, forest.base);
  put(body, forest.split_begin);
  put(body, forest.leaf_begin);
  put(body, forest.outputs);
  put(body, forest.splits);
  put(body, forest.values);
  put(body, forest.sets);
  h.crc = crc32(body.data(), body.size());
  std::vector<uint8_t> file;
  put<TreeHeader>(file, {h});
  put(file, body);
  std::shared_ptr<const TreeEnsemble> trees;
  CHECK(TreeEnsemble::load(file.data(), file.size(), &trees).is_ok());
  return trees;
}

int32_t oracle_leaf(const Forest& forest, uint32_t tree, const float* row) {
  const Split* splits = forest.splits.data() + forest.split_begin[tree];
  int32_t node = forest.split_begin[tree] == forest.split_begin[tree + 1] ? ~0 : 0;
  while (node >= 0) {
    const Split& s = splits[node];
    const float x = row[s.feature];
    bool left = x <= s.threshold;
    if (std::isnan(x)) {
      left = s.flags & kDefaultLeft;
    } else if (s.flags & kCategorical) {
      bool in_set = false;
      if ((x >= 0.0f || (x > -1.0f && (s.flags & kTruncateToZero))) && x < 2147483648.0f) {
        const auto code = static_cast<uint32_t>(x < 0.0f ? 0.0f : x);
        in_set = code / 32 < s.cat_count && (forest.sets[s.cat_begin + code / 32] >> (code % 32) & 1);
      }
      left = in_set == ((s.flags & kMatchLeft) != 0);
    }
    node = left ? s.left : s.right;
  }
  return ~node;
}

std::vector<float> make_rows(Rng& rng, const Forest& forest, size_t n) {
  const Shape& shape = forest.shape;
  std::vector<float> rows(n * shape.n_features);
  const float special[] = {kInfinity, -kInfinity, 0.0f, -0.0f, 1e-40f, -1e-40f, 3e9f, -0.5f};
  for (size_t i = 0; i < rows.size(); ++i) {
    // The first half of the rows has nothing missing: kernels have a path of their own for that.
    const bool may_miss = i >= rows.size() / 2;
    if (may_miss && chance(rng, 0.1)) {
      rows[i] = std::numeric_limits<float>::quiet_NaN();
    } else if (chance(rng, 0.1)) {
      rows[i] = special[rng() % std::size(special)];
    } else if (chance(rng, 0.3) && !forest.splits.empty()) {
      const float at = forest.splits[rng() % forest.splits.size()].threshold;
      const float to = rng() % 2 ? kInfinity : -kInfinity;
      rows[i] = rng() % 3 ? at : std::nextafter(at, to);
    } else if (shape.categorical > 0 && rng() % 2) {
      rows[i] = static_cast<float>(rng() % 80) - 8.0f;
    } else {
      rows[i] = std::normal_distribution<float>()(rng) * (shape.grid > 16 ? 4.0f : 1.0f);
    }
  }
  return rows;
}

void expect(bool ok, const char* what, const Shape& shape, int level, size_t n) {
  if (!ok) std::fprintf(stderr, "%s: level %d, %zu rows: %s differ\n", shape.name, level, n, what);
  CHECK(ok);
}

void check(Rng& rng, const Shape& shape) {
  const Forest forest = make(rng, shape);
  const auto trees = load(forest);
  constexpr size_t kRows = 150;
  const size_t width = shape.n_features, k_out = shape.n_outputs;
  const std::vector<float> rows = make_rows(rng, forest, kRows);
  std::vector<int32_t> leaves(kRows * shape.n_trees);
  std::vector<double> margins(kRows * k_out, 0.0);
  for (size_t r = 0; r < kRows; ++r) {
    size_t value_begin = 0;
    for (uint32_t t = 0; t < shape.n_trees; ++t) {
      const int32_t leaf = oracle_leaf(forest, t, rows.data() + r * width);
      leaves[r * shape.n_trees + t] = leaf;
      const size_t of_leaf = forest.outputs[t] < 0 ? k_out : 1;
      const double* value = forest.values.data() + value_begin + static_cast<size_t>(leaf) * of_leaf;
      for (size_t i = 0; i < of_leaf; ++i) {
        const size_t k = forest.outputs[t] < 0 ? i : static_cast<size_t>(forest.outputs[t]);
        margins[r * k_out + k] += value[i];
      }
      value_begin += (forest.leaf_begin[t + 1] - forest.leaf_begin[t]) * of_leaf;
    }
    for (size_t k = 0; k < k_out; ++k) margins[r * k_out + k] += forest.base[k];
  }
  TreeEnsemble::Scratch scratch(*trees);
  std::vector<int32_t> got_leaves(leaves.size());
  std::vector<double> got(margins.size());
  for (int level = 0; level < 3; ++level) {
    force_cpu_level(static_cast<CpuLevel>(level));
    // Sizes around each register's width, one block and more; starting anywhere, so that a batch may hold
    // missing values or none.
    for (const size_t n :
         {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 65, 127, 150}) {
      const size_t start = rng() % (kRows - n + 1);
      const float* from = rows.data() + start * width;
      trees->predict_leaf(from, n, width, got_leaves.data(), scratch);
      expect(std::memcmp(got_leaves.data(), leaves.data() + start * shape.n_trees,
                         n * shape.n_trees * sizeof(int32_t)) == 0,
             "leaves", shape, level, n);
      trees->predict_margin(from, n, width, got.data(), scratch);
      expect(std::memcmp(got.data(), margins.data() + start * k_out, n * k_out * sizeof(double)) == 0,
             "margins", shape, level, n);
    }
  }
  force_cpu_level(detected_cpu_level());
}

}  // namespace

int main() {
  Rng rng(7);
  //                name, features, trees, leaves, outputs, grid, categorical, skew, vector leaves
  const Shape shapes[] = {
      {"narrow", 6, 40, 1, 32, 1, 40, 0.0, 0.2, false},
      {"exactly 32 leaves", 3, 9, 32, 32, 1, 6, 0.0, 0.0, false},
      {"stumps and bare leaves", 4, 70, 1, 2, 1, 0, 0.0, 0.0, false},
      {"chains", 5, 12, 30, 32, 1, 0, 0.0, 1.0, false},
      {"more than one checkpoint group", 5, 600, 2, 9, 1, 100, 0.0, 0.2, false},
      {"many columns", 90, 60, 8, 31, 1, 30, 0.0, 0.2, false},
      {"thresholds of whole lines", 1, 1, 33, 33, 1, 0, 0.0, 0.2, false},
      {"wide", 6, 20, 33, 64, 1, 60, 0.0, 0.3, false},
      {"chains of 64", 2, 6, 64, 64, 1, 0, 0.0, 1.0, false},
      {"up to 256 leaves", 8, 12, 1, 256, 1, 200, 0.0, 0.3, false},
      {"exactly 256 leaves", 1, 5, 256, 256, 1, 0, 0.0, 0.4, false},
      {"more thresholds than a column holds", 2, 40, 20, 60, 1, 0, 0.0, 0.1, false},
      {"more than 256 leaves beside fewer", 5, 12, 1, 600, 1, 0, 0.05, 0.1, false},
      {"categorical", 6, 30, 2, 32, 1, 30, 0.4, 0.2, false},
      {"categorical, up to 200 leaves", 6, 10, 2, 200, 1, 30, 0.3, 0.2, false},
      {"several outputs", 6, 30, 1, 31, 3, 40, 0.1, 0.2, false},
      {"vector leaves", 6, 20, 1, 90, 4, 40, 0.0, 0.2, true},
  };
  for (const Shape& shape : shapes) {
    for (int round = 0; round < 3; ++round) check(rng, shape);
  }
  return 0;
}
