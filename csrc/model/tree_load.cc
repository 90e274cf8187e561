// Loading of trees.bin: every count and index is checked before anything is kept. Any thread.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "model/tree_ensemble.h"

namespace penstock {
namespace {

// Tables for eight bytes at a time: [k][b] is the crc of byte b followed by k zero bytes.
using CrcTables = std::array<std::array<uint32_t, 256>, 8>;
constexpr CrcTables crc_tables() {
  CrcTables tables{};
  for (uint32_t b = 0; b < 256; ++b) {
    uint32_t crc = b;
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
    tables[0][b] = crc;
  }
  for (size_t k = 1; k < 8; ++k) {
    for (size_t b = 0; b < 256; ++b) {
      const uint32_t before = tables[k - 1][b];
      tables[k][b] = (before >> 8) ^ tables[0][before & 0xff];
    }
  }
  return tables;
}

uint32_t crc32(const uint8_t* data, size_t size) {
  static constexpr CrcTables kTables = crc_tables();
  uint32_t crc = ~0u;
  for (; size >= 8; data += 8, size -= 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= crc;
    crc = 0;
    for (size_t i = 0; i < 8; ++i) crc ^= kTables[7 - i][word >> (8 * i) & 0xff];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8) ^ kTables[0][(crc ^ *data) & 0xff];
  return ~crc;
}

template <class T>
void take(const uint8_t*& at, size_t n, std::vector<T>* out) {
  out->resize(n);
  if (n != 0) std::memcpy(out->data(), at, n * sizeof(T));
  at += n * sizeof(T);
}

Status bad(const std::string& what) {
  return Status::invalid("trees.bin: " + what);
}

Status check_ranges(const std::vector<uint32_t>& begin, uint32_t total, const char* name) {
  if (begin.front() != 0 || begin.back() != total || !std::is_sorted(begin.begin(), begin.end())) {
    return bad(std::string(name) + " is not an ascending partition");
  }
  return Status::ok();
}

}  // namespace

Status TreeEnsemble::load(const uint8_t* data, size_t size, std::shared_ptr<const TreeEnsemble>* out) {
  auto made = std::make_shared<TreeEnsemble>();
  TreeHeader& h = made->header_;
  if (size < sizeof(h)) return bad("truncated header");
  std::memcpy(&h, data, sizeof(h));
  if (std::memcmp(h.magic, kTreeMagic, sizeof(kTreeMagic)) != 0) return bad("wrong magic");
  if (h.version != kTreeVersion) {
    return bad("version is " + std::to_string(h.version) + "; expected " + std::to_string(kTreeVersion));
  }
  // Sums of u32 counts times small sizes cannot overflow 64 bits.
  const uint64_t expected = sizeof(h) + 8ull * h.n_outputs + 8ull * (h.n_trees + 1ull) + 4ull * h.n_trees +
                            sizeof(Split) * static_cast<uint64_t>(h.n_splits) + 8ull * h.n_leaf_values +
                            4ull * h.n_cat_words;
  if (size != expected) {
    return bad("size is " + std::to_string(size) + "; expected " + std::to_string(expected));
  }
  if (crc32(data + sizeof(h), size - sizeof(h)) != h.crc) return bad("checksum does not match");
  if (h.n_features == 0 || h.n_features > (1u << 20)) return bad("n_features is out of range");
  if (h.n_outputs == 0 || h.n_trees == 0) return bad("n_outputs and n_trees must be positive");
  if (h.transform >= static_cast<uint32_t>(Transform::kCount)) return bad("unknown transform");
  if (h.average > 1 || h.reserved != 0 || !std::isfinite(h.alpha))
    return bad("a header field is out of range");
  const uint8_t* at = data + sizeof(h);
  take(at, h.n_outputs, &made->base_);
  take(at, h.n_trees + size_t{1}, &made->split_begin_);
  take(at, h.n_trees + size_t{1}, &made->leaf_begin_);
  take(at, h.n_trees, &made->tree_output_);
  take(at, h.n_splits, &made->splits_);
  take(at, h.n_leaf_values, &made->leaf_values_);
  take(at, h.n_cat_words, &made->cat_words_);
  if (Status s = check_ranges(made->split_begin_, h.n_splits, "split_begin"); !s.is_ok()) return s;
  if (Status s = check_ranges(made->leaf_begin_, h.n_leaves, "leaf_begin"); !s.is_ok()) return s;
  made->divisor_.assign(h.n_outputs, 0.0);
  uint64_t values = 0;
  for (uint32_t t = 0; t < h.n_trees; ++t) {
    if (Status s = made->check_tree(t); !s.is_ok()) return s;
    const int32_t output = made->tree_output_[t];
    if (output < -1 || output >= static_cast<int64_t>(h.n_outputs))
      return bad("a tree's output is out of range");
    made->value_begin_.push_back(static_cast<uint32_t>(values));
    const uint64_t leaves = made->leaf_begin_[t + 1] - made->leaf_begin_[t];
    values += leaves * (output < 0 ? h.n_outputs : 1);
    if (values > h.n_leaf_values) return bad("too few leaf values");
    if (output >= 0) {
      made->divisor_[output] += 1.0;
    } else {
      for (double& d : made->divisor_) d += 1.0;
    }
  }
  if (values != h.n_leaf_values) return bad("too many leaf values");
  for (double& d : made->divisor_) d = h.average != 0 && d > 0.0 ? d : 1.0;
  made->build_plan();
  *out = std::move(made);
  return Status::ok();
}

Status TreeEnsemble::check_tree(uint32_t tree) const {
  const Split* splits = splits_.data() + split_begin_[tree];
  const uint32_t n_splits = split_begin_[tree + 1] - split_begin_[tree];
  const uint32_t n_leaves = leaf_begin_[tree + 1] - leaf_begin_[tree];
  const std::string name = "tree " + std::to_string(tree);
  if (n_leaves != n_splits + 1ull) return bad(name + " must have one leaf more than splits");
  // A preorder walk must meet splits 0, 1, 2... and leaves 0, 1, 2...: so each is reached exactly once.
  std::vector<int32_t> stack{n_splits == 0 ? ~0 : 0};
  uint32_t next_split = 0, next_leaf = 0;
  while (!stack.empty()) {
    const int32_t node = stack.back();
    stack.pop_back();
    if (node < 0) {
      if (static_cast<uint32_t>(~node) != next_leaf++) return bad(name + " has leaves out of order");
      continue;
    }
    if (static_cast<uint32_t>(node) != next_split++ || next_split > n_splits) {
      return bad(name + " has splits out of order");
    }
    const Split& s = splits[node];
    if (s.feature >= header_.n_features) return bad(name + " has a feature out of range");
    if (s.flags > 15 || std::isnan(s.threshold)) return bad(name + " has a bad split");
    if (static_cast<uint64_t>(s.cat_begin) + s.cat_count > header_.n_cat_words) {
      return bad(name + " has a category set out of range");
    }
    stack.push_back(s.right);
    stack.push_back(s.left);
  }
  if (next_split != n_splits || next_leaf != n_leaves) return bad(name + " has unreachable nodes");
  return Status::ok();
}

void TreeEnsemble::build_plan() {
  one_output_ = header_.n_outputs == 1 &&
                std::all_of(tree_output_.begin(), tree_output_.end(), [](int32_t o) { return o == 0; });
  plan_ = plan_trees({header_.n_trees, splits_.data(), split_begin_.data(),
                      one_output_ ? leaf_values_.data() : nullptr, value_begin_.data()});
}

}  // namespace penstock
