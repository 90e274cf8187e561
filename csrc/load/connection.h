// One connection of the load generator: its requests in flight and its buffers. Knows neither time nor loop.
// One thread. Allocates only while its buffers grow.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <vector>

#include "load/replies.h"

namespace penstock::load {

struct InFlight {
  int64_t due_ns = 0;
  int64_t sent_ns = 0;
  uint32_t request = 0;
  uint16_t generation = 0;
  bool waiting = false;
};

// Bytes with room behind them; the front is consumed.
class ByteQueue {
 public:
  explicit ByteQueue(size_t capacity)
      : bytes_(std::make_unique_for_overwrite<uint8_t[]>(capacity)), capacity_(capacity) {}

  std::span<const uint8_t> content() const { return {bytes_.get() + begin_, end_ - begin_}; }
  bool empty() const { return begin_ == end_; }
  // At least `size` bytes of room.
  std::span<uint8_t> room(size_t size) {
    if (empty()) begin_ = end_ = 0;
    if (capacity_ - end_ < size) {
      const size_t used = end_ - begin_;
      if (capacity_ - used < size || begin_ < capacity_ / 2) {
        const size_t capacity = 2 * capacity_ > used + size ? 2 * capacity_ : used + size;
        auto grown = std::make_unique_for_overwrite<uint8_t[]>(capacity);
        std::memcpy(grown.get(), bytes_.get() + begin_, used);
        bytes_ = std::move(grown);
        capacity_ = capacity;
      } else {
        std::memmove(bytes_.get(), bytes_.get() + begin_, used);
      }
      begin_ = 0;
      end_ = used;
    }
    return {bytes_.get() + end_, capacity_ - end_};
  }
  void filled(size_t size) { end_ += size; }
  void consume(size_t size) { begin_ += size; }
  void clear() { begin_ = end_ = 0; }

 private:
  std::unique_ptr<uint8_t[]> bytes_;
  size_t capacity_;
  size_t begin_ = 0, end_ = 0;
};

struct Connection {
  explicit Connection(uint32_t depth) : slots(depth), fifo(depth), free(depth) { forget(); }

  enum class State : uint8_t { kDown, kConnecting, kUp };

  State state = State::kDown;
  int fd = -1;
  bool want_write = false;  // EPOLLOUT is asked for
  bool leaving = false;     // the server said that it goes away: send nothing more
  bool dirty = false;       // on the list of connections to flush
  int64_t connect_at_ns = 0;
  uint32_t in_flight = 0;
  std::vector<InFlight> slots;
  std::vector<uint32_t> fifo;  // slots in the order of sending, a ring (protocols that answer in order)
  uint32_t fifo_front = 0;
  std::vector<uint32_t> free;  // a stack of slots, free_count high
  uint32_t free_count = 0;
  ByteQueue input{64 << 10}, output{4 << 10};
  RpcReplies rpc;

  bool can_send() const { return state == State::kUp && !leaving && free_count != 0; }

  // Takes a slot; can_send() holds.
  uint32_t take(int64_t due_ns, int64_t now_ns, uint32_t request) {
    const uint32_t slot = free[--free_count];
    InFlight& one = slots[slot];
    one = {due_ns, now_ns, request, static_cast<uint16_t>(one.generation + 1), true};
    uint32_t back = fifo_front + in_flight;
    if (back >= fifo.size()) back -= static_cast<uint32_t>(fifo.size());
    fifo[back] = slot;
    ++in_flight;
    return slot;
  }
  uint32_t msgid(uint32_t slot) const { return uint32_t{slots[slot].generation} << 16 | slot; }
  // The slot of a msgid, or null.
  InFlight* find(uint32_t msgid) {
    const uint32_t slot = msgid & 0xffff;
    if (slot >= slots.size() || !slots[slot].waiting || slots[slot].generation != msgid >> 16) return nullptr;
    return &slots[slot];
  }
  // The request that must be answered next, or null.
  InFlight* oldest() { return in_flight == 0 ? nullptr : &slots[fifo[fifo_front]]; }
  void release(InFlight* one) {
    one->waiting = false;
    free[free_count++] = static_cast<uint32_t>(one - slots.data());
    --in_flight;
    if (++fifo_front == fifo.size()) fifo_front = 0;  // means nothing where replies come in any order
  }
  // Drops everything in flight and buffered.
  void forget() {
    free_count = static_cast<uint32_t>(slots.size());
    for (uint32_t i = 0; i < free_count; ++i) free[i] = free_count - 1 - i;
    for (InFlight& one : slots) one.waiting = false;
    in_flight = fifo_front = 0;
    leaving = want_write = false;
    input.clear();
    output.clear();
    rpc.reset();
  }
};

}  // namespace penstock::load
