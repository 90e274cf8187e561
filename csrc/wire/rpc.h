// The MessagePack-RPC envelope and the parameters of the two hot methods, decoded without a copy: every view
// points into the message and lives as long as it. Stateless functions; any thread.
#pragma once

#include <cstdint>
#include <string_view>

#include "base/status.h"
#include "wire/msgpack_reader.h"

namespace penstock::wire {

enum class EnvelopeKind : uint8_t { kRequest = 0, kResponse = 1, kNotification = 2 };

struct Envelope {
  EnvelopeKind kind = EnvelopeKind::kRequest;
  bool has_msgid = false;  // also set in an envelope that is refused further on
  uint32_t msgid = 0;
  std::string_view method;
  Cursor params;  // at the params array (request, notification)
};

Status decode_envelope(Cursor message, Envelope* envelope);

struct Column {
  std::string_view name;
  const uint8_t* value = nullptr;  // the scalar, or the first element of the list
  const uint8_t* end = nullptr;
  bool is_list = false;
  uint32_t count = 0;  // rows: 1 for a scalar

  Cursor cursor() const { return {value, end}; }
};

struct Columns {
  static constexpr uint32_t kMax = 64;
  uint32_t size = 0;
  Column column[kMax];
};

enum class RequestIds : uint8_t { kNone, kOne, kList };

// W3C Trace Context: who asks, in which trace.
struct TraceParent {
  uint64_t trace_high = 0, trace_low = 0;
  uint64_t span = 0;
  bool sampled = false;
};

struct Options {
  int64_t deadline_us = 0;  // 0: absent
  bool has_now = false;
  int64_t now_us = 0;
  RequestIds request_ids = RequestIds::kNone;
  uint64_t request_id = 0;  // kOne
  Cursor request_id_list;   // kList: at the first of request_id_count checked uint64
  uint32_t request_id_count = 0;
  bool high_priority = false;
  bool low_priority = false;
  bool timings = false;
  bool no_cache = false;
  TraceParent trace;  // not sampled where there is none
};

struct PredictCall {
  uint32_t msgid = 0;  // the caller's to set
  std::string_view model;
  Columns entities, inputs;
  uint32_t rows = 0;
  Options options;
};

struct VectorsCall {
  uint32_t msgid = 0;  // the caller's to set
  std::string_view model;
  const uint8_t* data = nullptr;  // little-endian float32, any alignment
  size_t bytes = 0;
  uint32_t rows = 0;
  Options options;
};

// Both reset `call` but for its msgid. `params` is at the params array.
Status decode_predict(Cursor params, PredictCall* call);
Status decode_predict_vectors(Cursor params, VectorsCall* call);

// What an error message calls a value: "entities.user_id[3]", or "entities.user_id" for a scalar.
struct ValueLabel {
  std::string_view group;
  std::string_view column;
  uint32_t row = 0;
  bool is_list = false;
};

// Each reads the next value of a column, or passes over nil and sets *null. On an error the cursor stays.
Status read_int64(Cursor& cursor, const ValueLabel& label, int64_t* value, bool* null);
Status read_f64(Cursor& cursor, const ValueLabel& label, double* value, bool* null);  // takes integers too
Status read_bool(Cursor& cursor, const ValueLabel& label, bool* value, bool* null);
Status read_str(Cursor& cursor, const ValueLabel& label, std::string_view* value, bool* null);
// Microseconds UTC: an int64, or the timestamp extension.
Status read_time(Cursor& cursor, const ValueLabel& label, int64_t* time_us, bool* null);

}  // namespace penstock::wire
