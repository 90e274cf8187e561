#include "features/event_value_tree.h"

#include <algorithm>
#include <bit>

namespace penstock {

void ValueTree::set(int64_t tile, const std::vector<ValueCount>& counts) {
  changed_.push_back(tile);
  const auto old = levels_[0].find(tile);
  if (old != levels_[0].end() && !old->second.listed) --n_unlisted_;
  if (counts.empty()) {
    levels_[0].erase(tile);
    return;
  }
  Node& node = levels_[0][tile];
  node = {};
  node.listed = counts.size() <= kMostValues;
  if (node.listed) {
    node.counts = counts;
    return;
  }
  ++n_unlisted_;
  node.registers.resize(kRegisters);
  for (const ValueCount& count : counts) hll_add(node.registers.data(), domain_->hash(count.value));
}

void ValueTree::settle() {
  std::sort(changed_.begin(), changed_.end());
  for (int level = 1; level < kLevels; ++level) {
    for (int64_t& k : changed_) k >>= 1;
    changed_.erase(std::unique(changed_.begin(), changed_.end()), changed_.end());
    for (const int64_t k : changed_) merge(level, k);
  }
  changed_.clear();
}

void ValueTree::merge(int level, int64_t k) {
  const Level& below = levels_[level - 1];
  const auto left = below.find(2 * k), right = below.find(2 * k + 1);
  const Node* parts[2] = {left == below.end() ? nullptr : &left->second,
                          right == below.end() ? nullptr : &right->second};
  if (parts[0] == nullptr && parts[1] == nullptr) {
    levels_[level].erase(k);
    return;
  }
  Node node;
  node.listed = true;
  for (const Node* part : parts) node.listed = node.listed && (part == nullptr || part->listed);
  if (node.listed) {
    static const std::vector<ValueCount> kNone;
    const std::vector<ValueCount>& a = parts[0] == nullptr ? kNone : parts[0]->counts;
    const std::vector<ValueCount>& b = parts[1] == nullptr ? kNone : parts[1]->counts;
    node.counts.reserve(a.size() + b.size());
    for (size_t i = 0, j = 0; i < a.size() || j < b.size();) {
      if (j == b.size() || (i < a.size() && a[i].value < b[j].value)) {
        node.counts.push_back(a[i++]);
      } else if (i == a.size() || b[j].value < a[i].value) {
        node.counts.push_back(b[j++]);
      } else {
        node.counts.push_back({a[i].value, a[i].times + b[j].times});
        ++i, ++j;
      }
    }
    node.listed = node.counts.size() <= kMostValues;
  }
  if (!node.listed) {
    node.counts = {};
    node.registers.resize(kRegisters);
    for (const Node* part : parts) {
      if (part == nullptr) continue;
      for (const ValueCount& count : part->counts) hll_add(node.registers.data(), domain_->hash(count.value));
      for (size_t r = 0; r < part->registers.size(); ++r) {
        node.registers[r] = std::max(node.registers[r], part->registers[r]);
      }
    }
  }
  levels_[level][k] = std::move(node);
}

void ValueTree::read_node(int level, int64_t k, ValueCounter* counts, uint8_t* registers,
                          bool* hashed) const {
  const auto found = levels_[level].find(k);
  if (found == levels_[level].end()) return;
  const Node& node = found->second;
  if (node.listed) {
    for (const ValueCount& count : node.counts) counts->add(count.value, count.times);
  } else if (registers != nullptr) {
    *hashed = true;
    for (size_t r = 0; r < kRegisters; ++r) registers[r] = std::max(registers[r], node.registers[r]);
  } else if (level > 0) {
    read_node(level - 1, 2 * k, counts, registers, hashed);
    read_node(level - 1, 2 * k + 1, counts, registers, hashed);
  }
}

void ValueTree::read(int64_t from, int64_t to, ValueCounter* counts, uint8_t* registers, bool* hashed) const {
  while (from < to) {
    const auto room = static_cast<uint64_t>(to) - static_cast<uint64_t>(from);
    int level = from == 0 ? kLevels - 1 : std::countr_zero(static_cast<uint64_t>(from));
    level = std::min({level, kLevels - 1, static_cast<int>(std::bit_width(room)) - 1});
    read_node(level, from >> level, counts, registers, hashed);
    from += int64_t{1} << level;
  }
}

}  // namespace penstock
