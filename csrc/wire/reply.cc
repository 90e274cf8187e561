#include "wire/reply.h"

namespace penstock::wire {
namespace {

// Undoes a reply that did not fit; says whether it did.
bool commit(Writer& out, size_t mark) {
  if (!out.overflowed()) return true;
  out.truncate(mark);
  return false;
}

}  // namespace

bool encode_scores(Writer& out, uint32_t msgid, const ScoresReply& reply) {
  const size_t mark = out.size();
  const uint64_t n = uint64_t{reply.n_rows} * reply.n_outputs;
  if (n > UINT32_MAX / sizeof(float)) return false;
  out.array(4);
  out.uint(1);
  out.uint(msgid);
  out.nil();
  out.map(3u + (reply.status != nullptr) + !reply.timings.empty());
  out.str("scores");
  if (reply.as_bin_f32) {
    out.bin_head(n * sizeof(float));
    for (uint64_t i = 0; i < n; ++i) {
      const auto bits = std::bit_cast<uint32_t>(static_cast<float>(reply.scores[i]));
      const uint8_t bytes[] = {static_cast<uint8_t>(bits), static_cast<uint8_t>(bits >> 8),
                               static_cast<uint8_t>(bits >> 16), static_cast<uint8_t>(bits >> 24)};
      out.raw(bytes, sizeof(bytes));
    }
  } else {
    out.array(static_cast<uint32_t>(n));
    for (uint64_t i = 0; i < n; ++i) out.f64(reply.scores[i]);
  }
  out.str("version");
  out.str(reply.version);
  out.str("request_ids");
  out.array(reply.n_rows);
  for (uint32_t i = 0; i < reply.n_rows; ++i) out.uint(reply.request_ids[i]);
  if (reply.status != nullptr) {
    out.str("status");
    out.array(reply.n_rows);
    for (uint32_t i = 0; i < reply.n_rows; ++i) out.uint(reply.status[i]);
  }
  if (!reply.timings.empty()) {
    out.str("timings");
    out.map(static_cast<uint32_t>(reply.timings.size()));
    for (const Timing& timing : reply.timings) {
      out.str(timing.stage);
      out.integer(timing.nanoseconds);
    }
  }
  return commit(out, mark);
}

bool encode_error(Writer& out, std::optional<uint32_t> msgid, const Status& error, bool retryable,
                  int64_t retry_after_ms) {
  const size_t mark = out.size();
  out.array(4);
  out.uint(1);
  if (msgid.has_value()) {
    out.uint(*msgid);
  } else {
    out.nil();
  }
  out.map(retry_after_ms < 0 ? 3 : 4);
  out.str("code");
  out.str(code_name(error.code));
  out.str("message");
  out.str(error.message);
  out.str("retryable");
  out.boolean(retryable);
  if (retry_after_ms >= 0) {
    out.str("retry_after_ms");
    out.integer(retry_after_ms);
  }
  out.nil();
  return commit(out, mark);
}

bool encode_raw_result(Writer& out, uint32_t msgid, std::string_view result) {
  const size_t mark = out.size();
  out.array(4);
  out.uint(1);
  out.uint(msgid);
  out.nil();
  out.raw(result.data(), result.size());
  return commit(out, mark);
}

bool encode_goaway(Writer& out, uint64_t grace_ms) {
  const size_t mark = out.size();
  out.array(3);
  out.uint(2);
  out.str("goaway");
  out.array(1);
  out.uint(grace_ms);
  return commit(out, mark);
}

}  // namespace penstock::wire
