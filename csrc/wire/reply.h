// Encoders of replies. Each appends one whole MessagePack-RPC response, or nothing: false means that the
// writer's bound was hit and the writer is as it was before. Called by the thread that owns the writer.
#pragma once

#include <optional>
#include <span>
#include <string_view>

#include "base/status.h"
#include "wire/msgpack_writer.h"

namespace penstock::wire {

struct Timing {
  std::string_view stage;
  int64_t nanoseconds;
};

struct ScoresReply {
  const double* scores = nullptr;  // n_rows * n_outputs, row-major
  uint32_t n_rows = 0;
  uint32_t n_outputs = 1;
  std::string_view version;
  const uint64_t* request_ids = nullptr;  // n_rows
  const uint8_t* status = nullptr;        // n_rows, or null to leave the field out
  std::span<const Timing> timings;        // empty: the field is left out
  bool as_bin_f32 = false;                // scores as `bin` of little-endian float32 in place of a list
};

// [1, msgid, nil, {"scores", "version", "request_ids", "status"?, "timings"?}]
bool encode_scores(Writer& out, uint32_t msgid, const ScoresReply& reply);
// [1, msgid, {"code", "message", "retryable", "retry_after_ms"?}, nil]; without a msgid the message could not
// be identified and nil stands there. retry_after_ms < 0 leaves the field out.
bool encode_error(Writer& out, std::optional<uint32_t> msgid, const Status& error, bool retryable,
                  int64_t retry_after_ms = -1);
// [1, msgid, nil, <result>]: `result` is one MessagePack value, already encoded.
bool encode_raw_result(Writer& out, uint32_t msgid, std::string_view result);
// [2, "goaway", [grace_ms]]
bool encode_goaway(Writer& out, uint64_t grace_ms);

}  // namespace penstock::wire
