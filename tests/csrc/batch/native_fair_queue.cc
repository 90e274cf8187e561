// OrderedQueue and FairQueue beside slow, obvious oracles, and the work that a hostile order of arrivals can
// cause.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "batch/fair_queue.h"
#include "check.h"

using namespace penstock;

namespace {

struct Nodes {
  std::vector<QueueLinks> link;
  std::vector<int64_t> key;
  mutable uint64_t compared = 0;

  explicit Nodes(size_t n) : link(n), key(n) {}
  QueueLinks& links(uint32_t i) { return link[i]; }
  bool before(uint32_t a, uint32_t b) const {
    ++compared;
    return key[a] != key[b] ? key[a] < key[b] : a < b;
  }
};

void ordered_queue_is_a_sorted_set() {
  for (uint64_t seed = 0; seed < 200; ++seed) {
    std::mt19937_64 rng(seed);
    Nodes nodes(1 + rng() % 64);
    OrderedQueue queue;
    std::set<std::pair<int64_t, uint32_t>> oracle;
    const bool rising = seed % 2 == 0;
    for (int step = 0; step < 2'000; ++step) {
      const auto i = static_cast<uint32_t>(rng() % nodes.key.size());
      const auto at = oracle.find({nodes.key[i], i});
      if (at != oracle.end()) {
        queue.remove(nodes, i);
        oracle.erase(at);
      } else {
        nodes.key[i] = rising && rng() % 8 != 0 ? step : static_cast<int64_t>(rng() % 100);
        queue.push(nodes, i);
        oracle.insert({nodes.key[i], i});
      }
      CHECK(queue.empty() == oracle.empty());
      CHECK(queue.top(nodes) == (oracle.empty() ? OrderedQueue::kNone : oracle.begin()->second));
      if (!oracle.empty() && rng() % 3 == 0) {
        queue.remove(nodes, oracle.begin()->second);
        oracle.erase(oracle.begin());
      }
    }
  }
}

// Rising, falling and random keys: what n pushes and n pops compare stays below 3 n log2 n.
void no_order_is_quadratic() {
  constexpr uint32_t kN = 1 << 16;
  for (const int order : {0, 1, 2}) {
    std::mt19937_64 rng(5);
    Nodes nodes(kN);
    OrderedQueue queue;
    for (uint32_t i = 0; i < kN; ++i) {
      nodes.key[i] = order == 0   ? i
                     : order == 1 ? -static_cast<int64_t>(i)
                                  : static_cast<int64_t>(rng() % kN);
      queue.push(nodes, i);
    }
    int64_t last = INT64_MIN;
    for (uint32_t n = 0; n < kN; ++n) {
      const uint32_t top = queue.top(nodes);
      CHECK(nodes.key[top] >= last);
      last = nodes.key[top];
      queue.remove(nodes, top);
    }
    CHECK(queue.empty());
    CHECK(nodes.compared <= uint64_t{3} * kN * 16);
    if (order == 0) CHECK(nodes.compared <= uint64_t{2} * kN);  // in order: constant
  }
}

struct Waiting {
  uint32_t flow;
  uint32_t rows;
  int64_t deadline_ns;
  uint64_t sequence;
};

// The rule of the header, by looking at everything each time.
void fair_queue_follows_its_rule() {
  constexpr uint32_t kSlots = 40;
  for (uint64_t seed = 0; seed < 24; ++seed) {
    std::mt19937_64 rng(seed);
    const uint32_t flows = 1 + rng() % 8;
    const size_t most = 1 + rng() % 64;
    FairQueue queue(kSlots, flows, most, 50'000'000);
    const uint64_t quantum = queue.quantum();
    CHECK(quantum >= most && quantum < 2 * most);
    std::map<uint32_t, Waiting> oracle;  // [slot]
    std::vector<uint64_t> tags(flows);
    uint64_t round = 0;
    uint64_t sequence = 0;
    int64_t now = 0;
    const auto waits = [&](uint32_t flow) {
      return std::any_of(oracle.begin(), oracle.end(), [&](const auto& w) { return w.second.flow == flow; });
    };
    const auto first = [&] {
      uint32_t best = FairQueue::kNone;
      std::tuple<uint64_t, int64_t, uint64_t> lowest;
      for (uint32_t flow = 0; flow < flows; ++flow) {
        const Waiting* head = nullptr;
        uint32_t head_slot = 0;
        for (const auto& [slot, w] : oracle) {
          if (w.flow != flow) continue;
          if (head == nullptr ||
              std::tie(w.deadline_ns, w.sequence) < std::tie(head->deadline_ns, head->sequence))
            head = &w, head_slot = slot;
        }
        if (head == nullptr) continue;
        const std::tuple key{tags[flow] / quantum, head->deadline_ns, head->sequence};
        if (best == FairQueue::kNone || key < lowest) best = head_slot, lowest = key;
      }
      return best;
    };
    for (int step = 0; step < 500; ++step) {
      now += static_cast<int64_t>(rng() % 1'000'000);
      for (auto at = oracle.begin(); at != oracle.end();) {  // as the lane's timer does
        if (at->second.deadline_ns > now) {
          ++at;
          continue;
        }
        queue.remove(at->first);
        at = oracle.erase(at);
      }
      const auto slot = static_cast<uint32_t>(rng() % kSlots);
      const auto flow = static_cast<uint32_t>(rng() % flows);
      if (oracle.count(slot) == 0 && rng() % 4 != 0) {
        const uint32_t rows = 1 + rng() % (rng() % 4 == 0 ? 200 : 4);
        const int64_t deadline =
            now + static_cast<int64_t>(rng() % 4 == 0 ? rng() % 200'000'000 : 50'000'000);
        if (!waits(flow)) tags[flow] = std::max(tags[flow], round * quantum);
        // What is said to come first is at least what would, were nothing else to arrive.
        const uint64_t ahead = queue.rows_ahead(flow, rows, deadline, now);
        queue.push(slot, flow, rows, deadline, ++sequence, now);
        oracle[slot] = {flow, rows, deadline, sequence};
        auto copy = oracle;
        auto copied_tags = tags;
        uint64_t before = 0;
        for (uint32_t next = first(); next != slot; next = first()) {
          ++before;
          ++tags[oracle[next].flow];
          if (--oracle[next].rows == 0) oracle.erase(next);
        }
        std::swap(oracle, copy);
        std::swap(tags, copied_tags);
        if (rows == 1) CHECK(before <= ahead);
      } else if (oracle.count(slot) != 0 && rng() % 8 == 0) {
        queue.remove(slot);
        oracle.erase(slot);
      } else if (!oracle.empty()) {
        const uint32_t next = first();
        CHECK(queue.top() == next);
        Waiting& w = oracle[next];
        CHECK(queue.rows_of(next) == w.rows && queue.deadline_of(next) == w.deadline_ns);
        const auto take = static_cast<uint32_t>(std::min<uint64_t>(w.rows, 1 + rng() % most));
        round = std::max(round, tags[w.flow] / quantum);
        tags[w.flow] += take;
        w.rows -= take;
        if (w.rows == 0) oracle.erase(next);
        queue.take(take);
      }
      uint64_t rows = 0;
      std::set<uint32_t> waiting;
      for (const auto& [s, w] : oracle) {
        rows += w.rows;
        waiting.insert(w.flow);
      }
      CHECK(queue.rows() == rows && queue.waiting_flows() == waiting.size());
      CHECK(queue.top() == first());
    }
  }
}

}  // namespace

int main() {
  ordered_queue_is_a_sorted_set();
  no_order_is_quadratic();
  fair_queue_follows_its_rule();
  return 0;
}
