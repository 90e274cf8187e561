// A priority queue of the indices of nodes that the owner keeps in an array: nothing is allocated, and a node
// can be taken out wherever it is.
//
// What comes in order, as deadlines mostly do, is appended to a sorted list: O(1). What comes before the
// list's end goes to a pairing heap (Fredman, Sedgewick, Sleator, Tarjan 1986): O(1) to add, O(log n)
// amortised to take out. So no order of arrivals, a hostile one included, makes an operation linear for long.
//
// `Nodes` gives links(i) of node i and before(a, b), a strict total order of the nodes in one queue that does
// not change while they are in it. Not thread-safe: the owner locks.
#pragma once

#include <cstdint>
#include <utility>

namespace penstock {

struct QueueLinks {
  static constexpr uint32_t kNone = UINT32_MAX;
  uint32_t prev = kNone;   // list: the one before; heap: the parent of a first child, else the sibling before
  uint32_t next = kNone;   // list: the one after; heap: the next sibling
  uint32_t child = kNone;  // heap: the first child
  bool in_heap = false;
};

class OrderedQueue {
 public:
  static constexpr uint32_t kNone = QueueLinks::kNone;

  bool empty() const { return head_ == kNone && root_ == kNone; }

  // The first node in order; kNone when empty.
  template <typename Nodes>
  uint32_t top(Nodes& nodes) const {
    if (root_ == kNone) return head_;
    return head_ == kNone || nodes.before(root_, head_) ? root_ : head_;
  }

  template <typename Nodes>
  void push(Nodes& nodes, uint32_t i) {
    QueueLinks& links = nodes.links(i);
    links = {};
    if (tail_ != kNone && nodes.before(i, tail_)) {
      links.in_heap = true;
      root_ = root_ == kNone ? i : meld(nodes, root_, i);
      return;
    }
    links.prev = tail_;
    (tail_ == kNone ? head_ : nodes.links(tail_).next) = i;
    tail_ = i;
  }

  template <typename Nodes>
  void remove(Nodes& nodes, uint32_t i) {
    const QueueLinks links = nodes.links(i);
    if (!links.in_heap) {
      (links.prev == kNone ? head_ : nodes.links(links.prev).next) = links.next;
      (links.next == kNone ? tail_ : nodes.links(links.next).prev) = links.prev;
      return;
    }
    const uint32_t orphans = merge(nodes, links.child);
    if (i == root_) {
      root_ = orphans;
      return;
    }
    QueueLinks& before = nodes.links(links.prev);
    (before.child == i ? before.child : before.next) = links.next;
    if (links.next != kNone) nodes.links(links.next).prev = links.prev;
    if (orphans != kNone) root_ = meld(nodes, root_, orphans);
  }

 private:
  // Two trees become one; the links of the new root to its siblings are left as they were.
  template <typename Nodes>
  static uint32_t meld(Nodes& nodes, uint32_t a, uint32_t b) {
    if (nodes.before(b, a)) std::swap(a, b);
    QueueLinks& parent = nodes.links(a);
    QueueLinks& child = nodes.links(b);
    child.prev = a;
    child.next = parent.child;
    if (parent.child != kNone) nodes.links(parent.child).prev = b;
    parent.child = b;
    return a;
  }

  // The siblings from `first` on become one tree: pairs from the left, then one by one from the right.
  template <typename Nodes>
  static uint32_t merge(Nodes& nodes, uint32_t first) {
    uint32_t pairs = kNone;  // the last made first, chained through next
    while (first != kNone) {
      uint32_t tree = first;
      const uint32_t second = nodes.links(tree).next;
      first = second == kNone ? kNone : nodes.links(second).next;
      if (second != kNone) tree = meld(nodes, tree, second);
      nodes.links(tree).next = pairs;
      pairs = tree;
    }
    uint32_t root = kNone;
    while (pairs != kNone) {
      const uint32_t tree = pairs;
      pairs = nodes.links(tree).next;
      nodes.links(tree).next = kNone;
      root = root == kNone ? tree : meld(nodes, root, tree);
    }
    if (root != kNone) nodes.links(root).next = nodes.links(root).prev = kNone;
    return root;
  }

  uint32_t head_ = kNone, tail_ = kNone;  // the list
  uint32_t root_ = kNone;                 // the heap
};

}  // namespace penstock
