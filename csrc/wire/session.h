// One connection's state, apart from its socket: input bytes to messages, the requests in flight, output
// bytes. Knows nothing of models, sockets or Python. One thread, the connection's loop thread, uses a
// Session.
//
// Views in a Message live until the next get_buffer(). After a framing error one error reply with a nil msgid
// is in the output and the session is closed to input: the caller flushes and hangs up.
#pragma once

#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "wire/reply.h"
#include "wire/rpc.h"

namespace penstock::wire {

struct SessionLimits {
  ScanLimits scan;
  uint32_t max_in_flight = 1024;
  size_t max_output_bytes = size_t{64} << 20;  // of each of the two output buffers
};

enum class MessageKind : uint8_t {
  kPredict,
  kPredictVectors,
  kCancel,        // msgid is in flight
  kOther,         // any other request
  kNotification,  // dropped and counted: a notification that is no valid cancel, or a response
  kBad,           // a request to be answered with `status`; it is not in flight
  kFramingError,  // the error reply is in the output already
};

struct Message {
  MessageKind kind = MessageKind::kBad;
  bool has_msgid = false;
  uint32_t msgid = 0;
  std::string_view method;
  Cursor params;
  Status status;
};

// The msgids of requests that are not answered yet: an open-addressing table that starts small and doubles up
// to what `limit` needs, so that ten thousand idle connections cost little.
class InFlight {
 public:
  explicit InFlight(uint32_t limit);
  bool contains(uint32_t msgid) const { return used_[find(msgid)]; }
  bool full() const { return size_ >= limit_; }
  uint32_t size() const { return size_; }
  void insert(uint32_t msgid);  // not full, not present
  bool erase(uint32_t msgid);

 private:
  uint32_t home(uint32_t msgid) const { return (msgid * 2654435769u) & mask_; }
  uint32_t find(uint32_t msgid) const;  // its slot, or the free slot where it would go
  void grow();

  uint32_t limit_;
  uint32_t mask_;
  uint32_t size_ = 0;
  std::vector<uint32_t> msgids_;
  std::vector<uint8_t> used_;
};

class Session {
 public:
  static constexpr size_t kChunk = 16 << 10;

  explicit Session(const SessionLimits& limits);

  // Room for the next read: at least one byte once next_message() has returned false, and up to about `hint`.
  // Empty when the session is closed or complete messages fill the buffer.
  std::span<uint8_t> get_buffer(size_t hint);
  // `n` bytes were written at the front of the last get_buffer().
  void advance(size_t n);
  // The next complete message; false when there is none yet or the session is closed.
  bool next_message(Message* message);
  // The request is answered. False: it was not in flight.
  bool finish(uint32_t msgid) { return in_flight_.erase(msgid); }

  Writer& out() { return *front_; }
  // The bytes to send, or null when there are none or earlier ones are still being sent. They stay as they
  // are until output_sent(); replies go to the other buffer meanwhile.
  const Writer* take_output();
  void output_sent();
  bool sending() const { return sending_; }  // take_output() gave bytes that are not all sent
  // Bytes of a message of which more must come, once next_message() has returned false.
  size_t unfinished_bytes() const { return closed_ ? 0 : end_ - begin_; }
  size_t pending_output_bytes() const { return front_->size() + (sending_ ? back_->size() : 0); }

  uint32_t in_flight() const { return in_flight_.size(); }
  bool closed() const { return closed_; }
  uint64_t dropped() const { return dropped_; }
  size_t input_capacity() const { return capacity_; }

 private:
  void classify(Cursor bytes, Message* message);
  void admit(const Envelope& envelope, Message* message);
  void fail_framing(ScanResult result, Message* message);

  SessionLimits limits_;
  FrameScanner scanner_;
  InFlight in_flight_;
  std::unique_ptr<uint8_t[]> input_;
  size_t capacity_ = 0;
  size_t begin_ = 0;  // first byte of the message being scanned
  size_t end_ = 0;
  std::unique_ptr<Writer> front_, back_;
  bool sending_ = false;
  bool closed_ = false;
  uint64_t dropped_ = 0;
};

}  // namespace penstock::wire
