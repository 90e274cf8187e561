#include "wire/rpc.h"

#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

namespace penstock::wire {
namespace {

constexpr size_t kMaxNameBytes = 256;
constexpr const char* kName = "a UTF-8 string of at most 256 bytes";

// The value at `cursor` as an error message shows it, cut to a readable length.
std::string describe(const Cursor& cursor) {
  Head head;
  if (!cursor.peek(&head)) return "missing";
  const auto with_type = [&](std::string text) {
    return text.append(" (").append(type_name(head.type)).append(")");
  };
  char text[40];
  switch (head.type) {
    case Type::kNil:
      return "nil";
    case Type::kBool:
      return with_type(head.bits ? "true" : "false");
    case Type::kUint:
      return with_type(std::to_string(head.bits));
    case Type::kNegative:
      return with_type(std::to_string(static_cast<int64_t>(head.bits)));
    case Type::kFloat32:
    case Type::kFloat64: {
      double value = 0;
      Cursor copy = cursor;
      (void)copy.read_float(&value);
      std::snprintf(text, sizeof(text), "%.17g", value);
      // The shortest form that reads back the same.
      for (int digits = 1; digits < 17; ++digits) {
        char shorter[40];
        std::snprintf(shorter, sizeof(shorter), "%.*g", digits, value);
        if (std::strtod(shorter, nullptr) == value) return with_type(shorter);
      }
      return with_type(text);
    }
    case Type::kStr: {
      constexpr size_t kShown = 40;
      std::string_view value;
      Cursor copy = cursor;
      (void)copy.read_str(&value);
      std::string shown = "\"";
      for (const char c : value.substr(0, kShown)) {
        shown += c >= 0x20 && c < 0x7f ? c : '?';
      }
      return with_type(shown + (value.size() > kShown ? "...\"" : "\""));
    }
    case Type::kBin:
    case Type::kExt:
      return "of " + std::to_string(head.payload_bytes) + " bytes (" + type_name(head.type) + ")";
    case Type::kArray:
      return "of " + std::to_string(head.children) + " values (list)";
    case Type::kMap:
      return "of " + std::to_string(head.children / 2) + " entries (map)";
  }
  return "unknown";
}

Status refuse(const std::string& field, const Cursor& at, const char* expected) {
  return Status::invalid(field + " is " + describe(at) + "; expected " + expected);
}

Status refuse(const ValueLabel& label, const Cursor& at, const char* expected) {
  std::string field(label.group);
  field += '.';
  field += label.column;
  if (label.is_list) field.append("[").append(std::to_string(label.row)).append("]");
  return refuse(field, at, expected);
}

bool read_utf8(Cursor& cursor, std::string_view* text) {
  Cursor probe = cursor;
  if (!probe.read_str(text) || !is_utf8(*text)) return false;
  cursor = probe;
  return true;
}

// A name is echoed in errors, so it has a bound of its own.
bool read_name(Cursor& cursor, std::string_view* name) {
  Cursor probe = cursor;
  if (!read_utf8(probe, name) || name->size() > kMaxNameBytes) return false;
  cursor = probe;
  return true;
}

// Adds the columns of one map (or nil) to the call; *rows is -1 until a column has set it.
Status decode_columns(Cursor& cursor, const char* group, Columns* columns, int64_t* rows) {
  if (cursor.at_end() || cursor.read_nil()) return {};
  uint32_t pairs;
  if (!cursor.read_map(&pairs)) return refuse(group, cursor, "a map of columns");
  if (pairs > Columns::kMax) {
    return Status::invalid(std::string(group) + " has " + std::to_string(pairs) +
                           " columns; expected at most " + std::to_string(Columns::kMax));
  }
  for (uint32_t i = 0; i < pairs; ++i) {
    Column& column = columns->column[i];
    if (!read_name(cursor, &column.name)) {
      return refuse("a column name of " + std::string(group), cursor, kName);
    }
    const std::string field = std::string(group) + "." + std::string(column.name);
    for (uint32_t j = 0; j < i; ++j) {
      if (columns->column[j].name == column.name) {
        return Status::invalid(field + " is given twice; expected each column once");
      }
    }
    Cursor value = cursor;
    if (!cursor.skip()) return refuse(field, value, "a value");
    column.count = 1;
    column.is_list = value.read_array(&column.count);
    column.value = value.position();
    column.end = cursor.position();
    if (*rows >= 0 && *rows != column.count) {
      return Status::invalid(field + " has " + std::to_string(column.count) + " rows; expected " +
                             std::to_string(*rows) + " as the columns before it");
    }
    *rows = column.count;
    columns->size = i + 1;
  }
  return {};
}

int64_t load_signed(const uint8_t* p, size_t bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes; ++i) value = value << 8 | p[i];
  return static_cast<int64_t>(value);
}

// int64 microseconds, or the timestamp extension (type -1; 4, 8 or 12 bytes).
bool read_time_us(Cursor& cursor, int64_t* time_us) {
  if (cursor.read_int(time_us)) return true;
  Cursor probe = cursor;
  int8_t type;
  const uint8_t* p;
  size_t size;
  if (!probe.read_ext(&type, &p, &size) || type != -1) return false;
  int64_t seconds;
  int64_t nanoseconds = 0;
  if (size == 4) {
    seconds = load_signed(p, 4);
  } else if (size == 8) {
    const auto packed = static_cast<uint64_t>(load_signed(p, 8));
    nanoseconds = static_cast<int64_t>(packed >> 34);
    seconds = static_cast<int64_t>(packed & ((uint64_t{1} << 34) - 1));
  } else if (size == 12) {
    nanoseconds = load_signed(p, 4);
    seconds = load_signed(p + 4, 8);
  } else {
    return false;
  }
  constexpr int64_t kMaxSeconds = INT64_MAX / 1'000'000 - 1;
  if (nanoseconds > 999'999'999 || seconds > kMaxSeconds || seconds < -kMaxSeconds) return false;
  *time_us = seconds * 1'000'000 + nanoseconds / 1000;
  cursor = probe;
  return true;
}

Status decode_deadline(Cursor& cursor, int64_t* deadline_us) {
  constexpr double kMaxMs = 1e12;  // some 31 years: far above every limit that a server sets
  Cursor at = cursor;
  double ms;
  if (!cursor.read_number(&ms) || !(ms > 0)) return refuse("options.deadline_ms", at, "a number above 0");
  *deadline_us = static_cast<int64_t>(std::ceil(std::fmin(ms, kMaxMs) * 1000));
  return {};
}

Status decode_request_ids(Cursor& cursor, Options* options) {
  if (cursor.read_uint(&options->request_id)) {
    options->request_ids = RequestIds::kOne;
    return {};
  }
  uint32_t count;
  if (!cursor.read_array(&count)) return refuse("options.request_id", cursor, "uint64 or a list of them");
  options->request_ids = RequestIds::kList;
  options->request_id_list = cursor;
  options->request_id_count = count;
  for (uint32_t i = 0; i < count; ++i) {
    uint64_t id;
    if (!cursor.read_uint(&id))
      return refuse("options.request_id[" + std::to_string(i) + "]", cursor, "uint64");
  }
  return {};
}

// "00-" 32 hex digits "-" 16 hex digits "-" 2 hex digits, lower case; later versions may go on after that.
// Version ff and ids of all zeros are invalid.
bool parse_traceparent(std::string_view text, TraceParent* trace) {
  constexpr size_t kLength = 55;
  if (text.size() < kLength || text[2] != '-' || text[35] != '-' || text[52] != '-') return false;
  const auto hex = [&](size_t at, size_t digits, uint64_t* value) {
    *value = 0;
    for (const char c : text.substr(at, digits)) {
      const bool letter = c >= 'a' && c <= 'f';
      if (!letter && (c < '0' || c > '9')) return false;
      *value = *value << 4 | static_cast<uint64_t>(letter ? c - 'a' + 10 : c - '0');
    }
    return true;
  };
  uint64_t version, flags;
  if (!hex(0, 2, &version) || !hex(3, 16, &trace->trace_high) || !hex(19, 16, &trace->trace_low) ||
      !hex(36, 16, &trace->span) || !hex(53, 2, &flags)) {
    return false;
  }
  if (version == 0xff || (text.size() > kLength && (version == 0 || text[kLength] != '-'))) return false;
  trace->sampled = (flags & 1) != 0;
  return (trace->trace_high | trace->trace_low) != 0 && trace->span != 0;
}

Status decode_option(std::string_view name, Cursor& cursor, Options* options) {
  if (cursor.read_nil()) return {};
  if (name == "deadline_ms") return decode_deadline(cursor, &options->deadline_us);
  if (name == "request_id") return decode_request_ids(cursor, options);
  if (name == "now") {
    options->has_now = read_time_us(cursor, &options->now_us);
    if (options->has_now) return {};
    return refuse("options.now", cursor, "int64 microseconds UTC or a timestamp");
  }
  if (name == "priority") {
    Cursor at = cursor;
    std::string_view level;
    const bool is_text = cursor.read_str(&level);
    options->high_priority = is_text && level == "high";
    options->low_priority = is_text && level == "low";
    if (options->high_priority || options->low_priority) return {};
    return refuse("options.priority", at, "\"high\" or \"low\"");
  }
  if (name == "timings" || name == "no_cache") {
    if (cursor.read_bool(name == "timings" ? &options->timings : &options->no_cache)) return {};
    return refuse("options." + std::string(name), cursor, "a bool");
  }
  if (name == "traceparent") {
    Cursor at = cursor;
    std::string_view text;
    if (cursor.read_str(&text) && parse_traceparent(text, &options->trace)) return {};
    return refuse("options.traceparent", at, "a W3C traceparent");
  }
  return Status::invalid(
      "options." + std::string(name) +
      " is unknown; expected deadline_ms, request_id, now, priority, timings, no_cache or traceparent");
}

Status decode_options(Cursor& cursor, uint32_t rows, Options* options) {
  if (cursor.at_end() || cursor.read_nil()) return {};
  uint32_t pairs;
  if (!cursor.read_map(&pairs)) return refuse("options", cursor, "a map");
  for (uint32_t i = 0; i < pairs; ++i) {
    std::string_view name;
    if (!read_name(cursor, &name)) return refuse("a name in options", cursor, kName);
    if (Status status = decode_option(name, cursor, options); !status.is_ok()) return status;
  }
  const uint32_t ids = options->request_ids == RequestIds::kList ? options->request_id_count : 1;
  if (options->request_ids != RequestIds::kNone && ids != rows) {
    return Status::invalid("options.request_id has " + std::to_string(ids) + " values; expected " +
                           std::to_string(rows) + ", one per row");
  }
  return {};
}

// Enters the params array and reads the model's name.
Status begin_params(Cursor& params, uint32_t least, const char* shape, std::string_view* model) {
  uint32_t count;
  const Cursor at = params;
  if (!params.read_array(&count) || count < least || count > 4) return refuse("params", at, shape);
  if (!read_name(params, model) || model->empty())
    return refuse("model", params, "a non-empty UTF-8 string of at most 256 bytes");
  return {};
}

bool read_null(Cursor& cursor, bool* null) {
  *null = cursor.read_nil();
  return *null;
}

}  // namespace

Status decode_envelope(Cursor message, Envelope* envelope) {
  *envelope = Envelope{};
  const Cursor begin = message;
  uint32_t count;
  uint64_t kind;
  if (!message.read_array(&count)) return refuse("message", begin, "a MessagePack-RPC list");
  const Cursor at_kind = message;
  if (!message.read_uint(&kind) || kind > 2) return refuse("message type", at_kind, "0, 1 or 2");
  envelope->kind = static_cast<EnvelopeKind>(kind);
  if (envelope->kind != EnvelopeKind::kNotification) {
    const Cursor at_msgid = message;
    uint64_t msgid;
    if (!message.read_uint(&msgid) || msgid > UINT32_MAX) return refuse("msgid", at_msgid, "uint32");
    envelope->has_msgid = true;
    envelope->msgid = static_cast<uint32_t>(msgid);
  }
  const uint32_t expected = envelope->kind == EnvelopeKind::kNotification ? 3 : 4;
  if (count != expected) return refuse("message", begin, expected == 3 ? "3 values" : "4 values");
  if (envelope->kind == EnvelopeKind::kResponse) return {};
  if (!read_name(message, &envelope->method)) return refuse("method", message, kName);
  Head head;
  if (!message.peek(&head) || head.type != Type::kArray) return refuse("params", message, "a list");
  envelope->params = message;
  return {};
}

Status decode_predict(Cursor params, PredictCall* call) {
  call->entities.size = 0;
  call->inputs.size = 0;
  call->rows = 0;
  call->options = Options{};
  Status status = begin_params(params, 2, "[model, entities, inputs?, options?]", &call->model);
  if (!status.is_ok()) return status;
  int64_t rows = -1;
  status = decode_columns(params, "entities", &call->entities, &rows);
  if (!status.is_ok()) return status;
  status = decode_columns(params, "inputs", &call->inputs, &rows);
  if (!status.is_ok()) return status;
  if (rows < 0) return Status::invalid("entities and inputs have no column; expected at least one");
  call->rows = static_cast<uint32_t>(rows);
  return decode_options(params, call->rows, &call->options);
}

Status decode_predict_vectors(Cursor params, VectorsCall* call) {
  call->data = nullptr;
  call->bytes = 0;
  call->rows = 0;
  call->options = Options{};
  Status status = begin_params(params, 3, "[model, data, rows, options?]", &call->model);
  if (!status.is_ok()) return status;
  if (!params.read_bin(&call->data, &call->bytes)) return refuse("data", params, "binary float32");
  const Cursor at = params;
  uint64_t rows;
  if (!params.read_uint(&rows) || rows > UINT32_MAX) return refuse("rows", at, "uint32");
  call->rows = static_cast<uint32_t>(rows);
  const bool whole = rows == 0 ? call->bytes == 0 : call->bytes % (rows * sizeof(float)) == 0;
  if (!whole) {
    return Status::invalid("data is of " + std::to_string(call->bytes) + " bytes; expected " +
                           std::to_string(rows) + " rows of float32");
  }
  return decode_options(params, call->rows, &call->options);
}

Status read_int64(Cursor& cursor, const ValueLabel& label, int64_t* value, bool* null) {
  if (read_null(cursor, null) || cursor.read_int(value)) return {};
  return refuse(label, cursor, "int64");
}

Status read_f64(Cursor& cursor, const ValueLabel& label, double* value, bool* null) {
  if (read_null(cursor, null) || cursor.read_number(value)) return {};
  return refuse(label, cursor, "a number");
}

Status read_bool(Cursor& cursor, const ValueLabel& label, bool* value, bool* null) {
  if (read_null(cursor, null) || cursor.read_bool(value)) return {};
  return refuse(label, cursor, "bool");
}

Status read_time(Cursor& cursor, const ValueLabel& label, int64_t* time_us, bool* null) {
  if (read_null(cursor, null) || read_time_us(cursor, time_us)) return {};
  return refuse(label, cursor, "int64 microseconds UTC or a timestamp");
}

Status read_str(Cursor& cursor, const ValueLabel& label, std::string_view* value, bool* null) {
  if (read_null(cursor, null) || read_utf8(cursor, value)) return {};
  return refuse(label, cursor, "a UTF-8 string");
}

}  // namespace penstock::wire
