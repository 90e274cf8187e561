// Which requests in flight ask for the same: one leads and runs, the others follow and share its result.
//
// Requests are numbers below the size given to the constructor, and belong to one group at most. Nothing
// allocates after it. One thread at a time: the owner locks.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "base/key.h"

namespace penstock {

class SingleFlight {
 public:
  static constexpr uint32_t kNone = UINT32_MAX;

  explicit SingleFlight(uint32_t requests)
      : nodes_(requests), groups_(requests), heads_(std::bit_ceil(requests < 2 ? 2 : requests), kNone) {
    for (uint32_t g = requests; g-- > 0;) free_groups_.push_back(g);
  }

  // The request that leads those of this key, or kNone.
  uint32_t leader(const Key128& key) const {
    const uint32_t g = find(key);
    return g == kNone ? kNone : groups_[g].leader;
  }
  bool leads(uint32_t request) const {
    const uint32_t g = nodes_[request].group;
    return g != kNone && groups_[g].leader == request;
  }
  bool in_group(uint32_t request) const { return nodes_[request].group != kNone; }

  // `request` begins the group of a key that has none.
  void lead(uint32_t request, const Key128& key) {
    const uint32_t g = free_groups_.back();
    free_groups_.pop_back();
    uint32_t& head = head_of(key);
    groups_[g] = {key, request, kNone, kNone, head};
    head = g;
    nodes_[request] = {g, kNone, kNone};
  }

  void follow(uint32_t request, uint32_t leader) {
    const uint32_t g = nodes_[leader].group;
    Group& group = groups_[g];
    nodes_[request] = {g, group.last, kNone};
    (group.last == kNone ? group.first : nodes_[group.last].next) = request;
    group.last = request;
  }

  // A follower goes its own way.
  void leave(uint32_t request) {
    Node& node = nodes_[request];
    Group& group = groups_[node.group];
    (node.previous == kNone ? group.first : nodes_[node.previous].next) = node.next;
    (node.next == kNone ? group.last : nodes_[node.next].previous) = node.previous;
    node = {};
  }

  // The first follower takes the leader's place, and the leader is in no group any more. The new leader;
  // kNone when none followed, and the group is gone.
  uint32_t hand_over(uint32_t leader) {
    const uint32_t g = nodes_[leader].group;
    const uint32_t next = groups_[g].first;
    if (next == kNone) {
      remove(g);
    } else {
      leave(next);
      nodes_[next].group = g;
      groups_[g].leader = next;
    }
    nodes_[leader] = {};
    return next;
  }

  // Any follower of the leader, or kNone.
  uint32_t first_follower(uint32_t leader) const { return groups_[nodes_[leader].group].first; }

 private:
  struct Node {
    uint32_t group = kNone, previous = kNone, next = kNone;
  };
  struct Group {
    Key128 key{};
    uint32_t leader = kNone, first = kNone, last = kNone;
    uint32_t next_in_chain = kNone;
  };

  const uint32_t& head_of(const Key128& key) const { return heads_[key.lo & (heads_.size() - 1)]; }
  uint32_t& head_of(const Key128& key) { return heads_[key.lo & (heads_.size() - 1)]; }
  uint32_t find(const Key128& key) const {
    uint32_t g = head_of(key);
    while (g != kNone && groups_[g].key != key) g = groups_[g].next_in_chain;
    return g;
  }
  void remove(uint32_t g) {
    uint32_t* at = &head_of(groups_[g].key);
    while (*at != g) at = &groups_[*at].next_in_chain;
    *at = groups_[g].next_in_chain;
    free_groups_.push_back(g);
  }

  std::vector<Node> nodes_;
  std::vector<Group> groups_;
  std::vector<uint32_t> heads_;  // chains of groups, by key
  std::vector<uint32_t> free_groups_;
};

}  // namespace penstock
