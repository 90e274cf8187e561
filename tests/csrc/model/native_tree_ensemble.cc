// Loads small forests built by hand: known leaves and scores, every CPU level, every truncation and
// every single-byte mutation (under a right checksum): refused or served, never out of bounds.
#include <cmath>
#include <cstring>
#include <memory>
#include <vector>

#include "../check.h"
#include "base/cpu.h"
#include "model/tree_ensemble.h"

using namespace penstock;

namespace {

uint32_t crc32(const uint8_t* data, size_t size) {
  uint32_t crc = ~0u;
  for (size_t i = 0; i < size; ++i) {
    crc ^= data[i];
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (crc & 1u ? 0xedb88320u : 0u);
  }
  return ~crc;
}

void seal(std::vector<uint8_t>& file) {
  const uint32_t crc = crc32(file.data() + sizeof(TreeHeader), file.size() - sizeof(TreeHeader));
  std::memcpy(file.data() + offsetof(TreeHeader, crc), &crc, 4);
}

template <class T>
void put(std::vector<uint8_t>& file, const std::vector<T>& values) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(values.data());
  file.insert(file.end(), bytes, bytes + values.size() * sizeof(T));
}

// One tree of two splits: x0 <= 1 (NaN left) ? (second split ? leaf 0 : leaf 1) : leaf 2.
std::vector<uint8_t> forest(bool categorical) {
  TreeHeader h{};
  std::memcpy(h.magic, kTreeMagic, 8);
  h.version = kTreeVersion;
  h.n_features = 2, h.n_outputs = 1, h.n_trees = 1, h.n_splits = 2, h.n_leaves = 3, h.n_leaf_values = 3;
  h.n_cat_words = categorical ? 1 : 0;
  h.alpha = 1.0;
  std::vector<uint8_t> file;
  put<TreeHeader>(file, {h});
  put<double>(file, {0.5});
  put<uint32_t>(file, {0, 2, 0, 3});
  put<int32_t>(file, {0});
  const Split second = categorical ? Split{1, ~0, ~1, 0.0f, kCategorical | kMatchLeft, 0, 1}
                                   : Split{1, ~0, ~1, -2.0f, 0, 0, 0};
  put<Split>(file, {{0, 1, ~2, 1.0f, kDefaultLeft, 0, 0}, second});
  put<double>(file, {10.0, 20.0, 30.0});
  if (categorical) put<uint32_t>(file, {1u << 3});
  seal(file);
  return file;
}

void check_scores(bool categorical) {
  const std::vector<uint8_t> file = forest(categorical);
  std::shared_ptr<const TreeEnsemble> trees;
  CHECK(TreeEnsemble::load(file.data(), file.size(), &trees).is_ok());
  const float in = categorical ? 3.0f : -2.0f, out = categorical ? 35.0f : std::nextafter(-2.0f, 0.0f);
  const float rows[] = {1.0f, in, NAN, out, 1.0f, NAN, std::nextafter(1.0f, 2.0f), in, -INFINITY, in};
  const double expected[] = {10.5, 20.5, 20.5, 30.5, 10.5};
  TreeEnsemble::Scratch scratch(*trees);
  for (int level = 0; level < 3; ++level) {
    force_cpu_level(static_cast<CpuLevel>(level));
    double scores[5];
    trees->predict(rows, 5, 2, scores, scratch);
    CHECK(std::memcmp(scores, expected, sizeof(scores)) == 0);
  }
}

void check_corruption(bool categorical) {
  const std::vector<uint8_t> file = forest(categorical);
  std::shared_ptr<const TreeEnsemble> trees;
  for (size_t size = 0; size < file.size(); ++size) {
    const std::vector<uint8_t> cut(file.begin(), file.begin() + static_cast<std::ptrdiff_t>(size));
    CHECK(!TreeEnsemble::load(cut.data(), cut.size(), &trees).is_ok());
  }
  size_t refused = 0;
  for (size_t at = 0; at < file.size(); ++at) {
    for (int value = 0; value < 256; value += 5) {
      std::vector<uint8_t> broken = file;
      broken[at] = static_cast<uint8_t>(value);
      seal(broken);
      if (!TreeEnsemble::load(broken.data(), broken.size(), &trees).is_ok()) {
        ++refused;
        continue;
      }
      const size_t n = 41, width = trees->n_features();
      if (width > 4096) continue;  // legal, but only slow
      const std::vector<float> rows(n * width, 2.0f);
      std::vector<double> scores(n * trees->n_outputs());
      TreeEnsemble::Scratch scratch(*trees);
      trees->predict(rows.data(), n, width, scores.data(), scratch);
    }
  }
  CHECK(refused > 1000);
}

}  // namespace

int main() {
  for (const bool categorical : {false, true}) {
    check_scores(categorical);
    check_corruption(categorical);
  }
  return 0;
}
