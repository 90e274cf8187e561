// The values of one column over a key's tiles, counted in nodes of 1, 2, 4, ... tiles, so that the values of
// a long window are those of a few nodes.
//
// Node (level, k) stands for the tiles k 2^level to (k + 1) 2^level - 1. It holds how often each value
// occurs, or, where there are more than kMostValues of them, only the registers of their hashes
// (aggregate_sets.h); a reader that needs the counts then goes to the node's halves, down to the events.
// Counts and registers do not depend on any order. Built and changed by one thread while no other reads;
// reads are const.
#pragma once

#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "features/aggregate_sets.h"

namespace penstock {

class ValueTree {
 public:
  static constexpr size_t kMostValues = 4096;  // that a node lists

  explicit ValueTree(const ValueDomain* domain) : domain_(domain) {}

  // Replaces the values of a tile, each once and ascending; none removes it. settle() then makes the nodes
  // above right.
  void set(int64_t tile, const std::vector<ValueCount>& counts);
  void settle();

  // Adds the values of the tiles [from, to) to `counts`. With `registers`, those of nodes without a list are
  // merged into them instead, and `hashed` is set; without, all tiles must have lists: see listed().
  void read(int64_t from, int64_t to, ValueCounter* counts, uint8_t* registers, bool* hashed) const;
  bool listed() const { return n_unlisted_ == 0; }

 private:
  static constexpr int kLevels = 11;
  struct Node {
    bool listed = false;
    std::vector<ValueCount> counts;
    std::vector<uint8_t> registers;
  };
  using Level = std::unordered_map<int64_t, Node>;

  void merge(int level, int64_t k);
  void read_node(int level, int64_t k, ValueCounter* counts, uint8_t* registers, bool* hashed) const;

  const ValueDomain* domain_;
  Level levels_[kLevels];
  size_t n_unlisted_ = 0;         // tiles
  std::vector<int64_t> changed_;  // tiles since settle()
};

}  // namespace penstock
