// The plan is linear in the splits: 32 bytes a piece, 8 a node, and at most kCheckpointTrees * 8 /
// kCheckpointStep bytes of checkpoints a split of a tree of at most 64 leaves.
#include "model/tree_plan.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <map>
#include <tuple>
#include <utility>

namespace penstock {
namespace {

constexpr uint32_t kSmallLeaves = 64, kNarrowLeaves = 32, kByteLeaves = 256;

// (feature) of a numeric split; (feature, flags, set) of a categorical one, whose flags are never 0.
using ColumnKey = std::tuple<uint32_t, uint32_t, uint32_t, uint32_t>;

ColumnKey key_of(const Split& s) {
  if (s.flags & kCategorical) return {s.feature, s.flags, s.cat_begin, s.cat_count};
  return {s.feature, 0, 0, 0};
}

// A categorical split's column is chosen by its key alone.
bool nan_right(const Split& s) {
  return !(s.flags & (kCategorical | kDefaultLeft));
}

struct DraftColumn {
  std::vector<float> thresholds;  // distinct, ascending; one zero for a categorical column
  uint32_t split = 0;
  bool used[2] = {false, false};  // by nan_right
  uint32_t index[2] = {0, 0};
};
using Draft = std::map<ColumnKey, DraftColumn>;

float threshold_of(const Split& s) {
  return s.flags & kCategorical ? 0.0f : s.threshold;
}

class RunBuilder {
 public:
  RunBuilder(const TreeArrays& trees, TreePlan* plan) : trees_(trees), plan_(plan) {}

  // Appends the runs of all trees, each as long as its columns allow.
  void build() {
    uint32_t first = 0;
    while (first < trees_.n_trees) {
      TreeRun run{};
      run.first_tree = first;
      run.ranked = leaves(first) <= kByteLeaves;
      Draft draft;
      uint32_t end = first;
      while (end < trees_.n_trees && (leaves(end) <= kByteLeaves) == run.ranked) {
        if (run.ranked && !add_tree(end, draft)) break;
        ++end;
      }
      run.n_trees = end - first;
      if (run.ranked) fill(run, draft);
      plan_->runs.push_back(std::move(run));
      first = end;
    }
  }

 private:
  uint32_t n_splits(uint32_t t) const { return trees_.split_begin[t + 1] - trees_.split_begin[t]; }
  uint32_t leaves(uint32_t t) const { return n_splits(t) + 1; }
  const Split* splits(uint32_t t) const { return trees_.splits + trees_.split_begin[t]; }

  // Adds a tree's thresholds, all or none: a tree of at most 255 splits always fits an empty draft.
  bool add_tree(uint32_t t, Draft& draft) {
    std::vector<std::pair<ColumnKey, float>> added;
    bool fits = true;
    for (uint32_t i = 0; i < n_splits(t) && fits; ++i) {
      const Split& s = splits(t)[i];
      auto [column, is_new] = draft.try_emplace(key_of(s));
      if (is_new) column->second.split = trees_.split_begin[t] + i;
      column->second.used[nan_right(s)] = true;
      std::vector<float>& known = column->second.thresholds;
      const auto at = std::lower_bound(known.begin(), known.end(), threshold_of(s));
      if (at != known.end() && *at == threshold_of(s)) continue;
      known.insert(at, threshold_of(s));
      added.emplace_back(key_of(s), threshold_of(s));
      fits = known.size() <= kRankMax && 2 * draft.size() <= kColumnsMax;
    }
    if (fits) return true;
    for (const auto& [key, threshold] : added) {
      std::vector<float>& known = draft[key].thresholds;
      known.erase(std::lower_bound(known.begin(), known.end(), threshold));
      if (known.empty()) draft.erase(key);
    }
    return false;
  }

  void fill(TreeRun& run, Draft& draft) {
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (auto& [key, column] : draft) {
      const Split& s = trees_.splits[column.split];
      const std::vector<float>& sorted = column.thresholds;
      bool twin = false;
      for (const bool right : {false, true}) {
        if (!column.used[right]) continue;
        column.index[right] = static_cast<uint32_t>(run.columns.size());
        run.columns.push_back({s.feature, static_cast<uint32_t>(sorted.size()),
                               static_cast<uint32_t>(plan_->search.size()), column.split, right, twin,
                               static_cast<bool>(s.flags & kCategorical)});
        twin = true;
      }
      const auto value = [&](size_t i) { return i < sorted.size() ? sorted[i] : kInfinity; };
      FloatLine line;
      for (size_t i = 0; i < 16; ++i) line.values[i] = value(16 * i + 15);
      plan_->search.push_back(line);
      // One line more where the last is full: a value above all looks there.
      for (size_t start = 0; start <= sorted.size(); start += 16) {
        for (size_t i = 0; i < 16; ++i) line.values[i] = value(start + i);
        plan_->search.push_back(line);
      }
    }
    plan_->columns_max = std::max(plan_->columns_max, run.columns.size());
    bool small = true;
    run.narrow = true;
    for (uint32_t t = run.first_tree; t < run.first_tree + run.n_trees; ++t) {
      small = small && leaves(t) <= kSmallLeaves;
      run.narrow = run.narrow && leaves(t) <= kNarrowLeaves;
    }
    place_splits(run, draft);
    for (uint32_t t = run.first_tree; t < run.first_tree + run.n_trees; ++t) add_pieces(run, t);
    run.piece_begin.push_back(static_cast<uint32_t>(run.pieces.size()));
    if (small) {
      for (uint32_t first = 0; first < run.n_trees; first += kCheckpointTrees) {
        add_group(run, run.first_tree + first, std::min<uint32_t>(kCheckpointTrees, run.n_trees - first));
      }
    } else {
      for (uint32_t t = run.first_tree; t < run.first_tree + run.n_trees; ++t) add_nodes(run, t);
      run.node_begin.push_back(static_cast<uint32_t>(run.nodes.size()));
      // A walk that has ended at the last leaf of the last tree still reads a node by that number.
      run.nodes.push_back({0, 127, 0, {kLeafNode, kLeafNode}});
    }
    if (run.narrow && trees_.values != nullptr) add_halves(run);
  }

  struct Place {
    uint16_t column;
    int8_t threshold;
  };

  // Where each split of the run compares, by its number in the run.
  void place_splits(const TreeRun& run, const Draft& draft) {
    places_.clear();
    first_split_ = trees_.split_begin[run.first_tree];
    const uint32_t end = trees_.split_begin[run.first_tree + run.n_trees];
    for (uint32_t i = first_split_; i < end; ++i) {
      const Split& s = trees_.splits[i];
      const DraftColumn& column = draft.at(key_of(s));
      const auto& known = column.thresholds;
      const auto rank = std::lower_bound(known.begin(), known.end(), threshold_of(s)) - known.begin();
      places_.push_back(
          {static_cast<uint16_t>(8 * column.index[nan_right(s)]), static_cast<int8_t>(rank + kRankBias)});
    }
  }

  const Place* places(uint32_t t) const { return places_.data() + (trees_.split_begin[t] - first_split_); }

  // The fewest connected pieces of at most kPieceSplits: from the leaves up, a split keeps the parts below it
  // and gives up the larger where they do not fit (Kundu and Misra 1977).
  void add_pieces(TreeRun& run, uint32_t t) {
    run.piece_begin.push_back(static_cast<uint32_t>(run.pieces.size()));
    const uint32_t n = n_splits(t);
    const Split* of = splits(t);
    std::vector<uint8_t> size(n), root(n, 0);
    std::vector<uint32_t> leftmost(n);
    for (uint32_t i = n; i-- > 0;) {  // children come after their parent
      leftmost[i] = of[i].left < 0 ? static_cast<uint32_t>(~of[i].left) : leftmost[of[i].left];
      size_t left = of[i].left < 0 ? 0 : size[of[i].left], right = of[i].right < 0 ? 0 : size[of[i].right];
      while (1 + left + right > kPieceSplits) {
        size_t& larger = left > right ? left : right;
        root[&larger == &left ? of[i].left : of[i].right] = 1;
        larger = 0;
      }
      size[i] = static_cast<uint8_t>(1 + left + right);
    }
    for (uint32_t i = 0; i < n; ++i) {
      if (i != 0 && !root[i]) continue;
      TreePiece piece{};
      piece.start = static_cast<uint8_t>(leftmost[i]);
      // Members in preorder, so a member's bit is found by its index.
      uint32_t members[kPieceSplits];
      size_t count = 0;
      uint32_t stack[kPieceSplits + 1] = {i};
      size_t waiting = 1;
      while (waiting > 0) {
        const uint32_t at = stack[--waiting];
        const Place where = places(t)[at];
        piece.column[count] = where.column;
        piece.threshold[count] = where.threshold;
        members[count++] = at;
        for (const int32_t child : {of[at].right, of[at].left}) {
          if (child >= 0 && !root[child]) stack[waiting++] = static_cast<uint32_t>(child);
        }
      }
      for (uint32_t code = 0; code < 16; ++code) {
        int32_t at = static_cast<int32_t>(i);
        do {
          const size_t bit =
              static_cast<size_t>(std::find(members, members + count, static_cast<uint32_t>(at)) - members);
          at = code >> bit & 1 ? of[at].right : of[at].left;
        } while (at >= 0 && !root[at]);
        piece.next[code] = static_cast<uint8_t>(at < 0 ? static_cast<uint32_t>(~at) : leftmost[at]);
      }
      run.pieces.push_back(piece);
    }
  }

  void add_nodes(TreeRun& run, uint32_t t) {
    run.node_begin.push_back(static_cast<uint32_t>(run.nodes.size()));
    const auto child = [](int32_t c) { return static_cast<uint16_t>(c < 0 ? kLeafNode + ~c : c); };
    for (uint32_t i = 0; i < n_splits(t); ++i) {
      const Split& s = splits(t)[i];
      const Place where = places(t)[i];
      run.nodes.push_back({where.column, where.threshold, 0, {child(s.left), child(s.right)}});
    }
    // A tree of one leaf still has a node to begin with.
    if (n_splits(t) == 0) run.nodes.push_back({0, 127, 0, {kLeafNode, kLeafNode}});
  }

  void add_group(TreeRun& run, uint32_t first, uint32_t n) {
    struct Entry {
      uint32_t column, rank, tree;
      uint64_t keep;
    };
    std::vector<Entry> entries;
    for (uint32_t t = first; t < first + n; ++t) {
      const Split* of = splits(t);
      std::vector<uint32_t> leftmost(n_splits(t));
      for (uint32_t i = n_splits(t); i-- > 0;) {
        leftmost[i] = of[i].left < 0 ? static_cast<uint32_t>(~of[i].left) : leftmost[of[i].left];
        // Leaves of the left subtree: from its leftmost up to the leftmost of the right one.
        const uint32_t high = of[i].right < 0 ? static_cast<uint32_t>(~of[i].right) : leftmost[of[i].right];
        const uint64_t cleared = ((1ull << (high - leftmost[i])) - 1) << leftmost[i];
        const Place where = places(t)[i];
        entries.push_back(
            {where.column / 8u, static_cast<uint32_t>(where.threshold - kRankBias), t - first, ~cleared});
      }
    }
    std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
      return std::tie(a.column, a.rank, a.tree) < std::tie(b.column, b.rank, b.tree);
    });
    CheckpointGroup group{};
    group.first_tree = first - run.first_tree;
    group.n_trees = n;
    const size_t mask_bytes = run.narrow ? 4 : 8;
    group.row_lines = static_cast<uint32_t>((n * mask_bytes + 63) / 64);
    std::vector<uint64_t> masks(n);
    const auto checkpoint = [&] {
      const size_t at = group.lines.size();
      ByteLine ones;
      std::memset(&ones, 0xff, sizeof(ones));
      group.lines.resize(at + group.row_lines, ones);
      auto* to = group.lines[at].bytes;
      for (size_t t = 0; t < n; ++t) std::memcpy(to + t * mask_bytes, &masks[t], mask_bytes);
    };
    const auto add_entry = [&](uint32_t tree, uint64_t keep) {
      group.trees.push_back(static_cast<uint16_t>(tree));
      if (run.narrow) {
        group.narrow.push_back(static_cast<uint32_t>(keep));
      } else {
        group.wide.push_back(keep);
      }
    };
    for (size_t start = 0; start < entries.size();) {
      const uint32_t index = entries[start].column;
      group.columns.push_back({8 * index, static_cast<uint32_t>(group.ends.size()),
                               static_cast<uint32_t>(group.trees.size()),
                               static_cast<uint32_t>(group.lines.size())});
      size_t end = start;
      std::fill(masks.begin(), masks.end(), ~0ull);
      for (; end < entries.size() && entries[end].column == index; ++end) {
        if ((end - start) % kCheckpointStep == 0) checkpoint();
        masks[entries[end].tree] &= entries[end].keep;
        add_entry(entries[end].tree, entries[end].keep);
      }
      if ((end - start) % kCheckpointStep == 0) checkpoint();
      const size_t padding = kCheckpointStep - (end - start) % kCheckpointStep;
      for (size_t i = 0; i < padding; ++i) add_entry(0, ~0ull);
      size_t failed = start;
      for (uint32_t rank = 0; rank <= run.columns[index].size; ++rank) {
        while (failed < end && entries[failed].rank < rank) ++failed;
        group.ends.push_back(static_cast<uint32_t>(failed - start));
      }
      // A missing value that goes right has the rank kRankMax.
      if (run.columns[index].nan_right) {
        group.ends.resize(group.ends.size() + kRankMax - run.columns[index].size,
                          static_cast<uint32_t>(end - start));
      }
      start = end;
    }
    run.groups.push_back(std::move(group));
  }

  void add_halves(TreeRun& run) {
    for (uint32_t t = run.first_tree; t < run.first_tree + run.n_trees; ++t) {
      ByteLine lines[4] = {};
      for (uint32_t leaf = 0; leaf < leaves(t); ++leaf) {
        const auto bits = std::bit_cast<uint64_t>(trees_.values[trees_.value_begin[t] + leaf]);
        const auto low = static_cast<uint32_t>(bits), high = static_cast<uint32_t>(bits >> 32);
        std::memcpy(lines[leaf / 16].bytes + leaf % 16 * 4, &low, 4);
        std::memcpy(lines[2 + leaf / 16].bytes + leaf % 16 * 4, &high, 4);
      }
      run.halves.insert(run.halves.end(), lines, lines + 4);
    }
  }

  const TreeArrays& trees_;
  TreePlan* plan_;
  std::vector<Place> places_;
  uint32_t first_split_ = 0;
};

}  // namespace

TreePlan plan_trees(const TreeArrays& trees) {
  TreePlan plan;
  RunBuilder(trees, &plan).build();
  return plan;
}

}  // namespace penstock
