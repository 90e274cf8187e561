// Finding and judging replies in the bytes that a connection received. Nothing here allocates per reply
// except for chunked bodies, whose scratch is reused. One thread at a time uses a ReplyReader.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "load/load.h"
#include "wire/msgpack_reader.h"

namespace penstock::load {

// The scores that a request should bring, and the largest difference seen so far.
struct Judge {
  std::span<const double> expected;  // of this request; empty: not verified
  double tolerance = 0;
  double* max_error = nullptr;

  // Counts one score more; false: too many, or too far off.
  bool take(double score);
  bool complete() const { return taken == expected.size(); }

  size_t taken = 0;
};

enum class Found : uint8_t { kNeedMore, kReply, kNotification, kBroken };

struct Reply {
  size_t bytes = 0;  // its length in the stream
  // MessagePack-RPC:
  uint32_t msgid = 0;
  bool goaway = false;  // of a notification
  wire::Cursor error;   // at the error, which may be nil
  // HTTP:
  int status = 0;
  bool closes = false;  // the server ends the connection after it
  std::span<const uint8_t> body;
};

// Scores in a MessagePack-RPC reply: the outcome, and the code's name where it is not one of the wire's.
Outcome judge_rpc(const Reply& reply, Judge* judge, std::string_view* other_code);
// Scores in a body.
bool judge_body(std::span<const uint8_t> body, BodyFormat format, std::string_view json_key, Judge* judge);

// Finds the next reply of a MessagePack-RPC stream.
class RpcReplies {
 public:
  RpcReplies() : scanner_(wire::ScanLimits{}) {}
  Found next(std::span<const uint8_t> stream, Reply* reply);
  void reset() { scanner_.reset(); }

 private:
  wire::FrameScanner scanner_;
};

// Finds the next response of an HTTP/1.1 stream; interim (1xx) responses are passed over. `scratch` holds the
// body of a chunked response until the next call.
Found next_http(std::span<const uint8_t> stream, std::vector<uint8_t>* scratch, Reply* reply);

}  // namespace penstock::load
