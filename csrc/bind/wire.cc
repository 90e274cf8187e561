// Binding of csrc/wire for the server and the tests. Every call holds the GIL.
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "bind/bind.h"
#include "wire/session.h"

namespace penstock::bind {
namespace {

using namespace wire;

Cursor cursor_of(std::string_view bytes) {
  const auto* p = reinterpret_cast<const uint8_t*>(bytes.data());
  return {p, p + bytes.size()};
}

py::bytes bytes_of(const Writer& out) {
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

void check(const Status& status) {
  if (!status.is_ok()) throw py::value_error(status.message);
}

// Re-encodes one value; false when the bytes are no value. Depth is bounded by the scan that comes first.
bool transcode_value(Cursor& in, Writer& out) {
  Head head;
  if (!in.peek(&head)) return false;
  std::string_view text;
  const uint8_t* data;
  size_t size;
  int8_t ext_type;
  bool flag;
  double real;
  uint64_t natural;
  int64_t number;
  uint32_t count;
  if (in.read_nil()) {
    out.nil();
  } else if (in.read_bool(&flag)) {
    out.boolean(flag);
  } else if (in.read_int(&number)) {
    out.integer(number);
  } else if (in.read_uint(&natural)) {
    out.uint(natural);
  } else if (in.read_float(&real)) {
    head.type == Type::kFloat32 ? out.f32(static_cast<float>(real)) : out.f64(real);
  } else if (in.read_str(&text)) {
    out.str(text);
  } else if (in.read_bin(&data, &size)) {
    out.bin(data, size);
  } else if (in.read_ext(&ext_type, &data, &size)) {
    out.ext(ext_type, data, size);
  } else {
    const bool is_map = in.read_map(&count);
    if (!is_map && !in.read_array(&count)) return false;
    is_map ? out.map(count) : out.array(count);
    for (uint64_t i = 0; i < (is_map ? 2ull : 1ull) * count; ++i) {
      if (!transcode_value(in, out)) return false;
    }
  }
  return true;
}

py::bytes transcode(std::string_view message) {
  FrameScanner scanner(ScanLimits{size_t{1} << 30, FrameScanner::kMaxDepth});
  const auto* data = reinterpret_cast<const uint8_t*>(message.data());
  Cursor in = cursor_of(message);
  Writer out(size_t{1} << 30);
  if (scanner.scan(data, message.size()) != ScanResult::kComplete || !transcode_value(in, out) ||
      !in.at_end() || out.overflowed()) {
    throw py::value_error("message is not one MessagePack value");
  }
  return bytes_of(out);
}

py::list column_values(const Column& column, const char* group, const std::string& kind) {
  py::list values;
  Cursor cursor = column.cursor();
  for (uint32_t row = 0; row < column.count; ++row) {
    const ValueLabel label{group, column.name, row, column.is_list};
    bool null = false;
    py::object value = py::none();
    if (kind == "int64") {
      int64_t number = 0;
      check(read_int64(cursor, label, &number, &null));
      if (!null) value = py::int_(number);
    } else if (kind == "float64") {
      double number = 0;
      check(read_f64(cursor, label, &number, &null));
      if (!null) value = py::float_(number);
    } else if (kind == "bool") {
      bool flag = false;
      check(read_bool(cursor, label, &flag, &null));
      if (!null) value = py::bool_(flag);
    } else if (kind == "string") {
      std::string_view text;
      check(read_str(cursor, label, &text, &null));
      if (!null) value = py::str(text.data(), text.size());
    } else {
      throw py::value_error("kind is " + kind + "; expected int64, float64, bool or string");
    }
    values.append(value);
  }
  return values;
}

py::dict columns_of(const Columns& columns, const char* group, const py::dict& kinds) {
  py::dict result;
  for (uint32_t i = 0; i < columns.size; ++i) {
    const Column& column = columns.column[i];
    const py::str name(column.name.data(), column.name.size());
    const std::string kind = kinds.contains(name) ? py::cast<std::string>(kinds[name]) : "int64";
    result[name] = column_values(column, group, kind);
  }
  return result;
}

py::dict options_of(const Options& options) {
  py::dict result;
  result["deadline_us"] = options.deadline_us;
  result["now_us"] = options.has_now ? py::object(py::int_(options.now_us)) : py::object(py::none());
  py::object ids = py::none();
  if (options.request_ids == RequestIds::kOne) ids = py::int_(options.request_id);
  if (options.request_ids == RequestIds::kList) {
    py::list list;
    Cursor cursor = options.request_id_list;
    for (uint32_t i = 0; i < options.request_id_count; ++i) {
      uint64_t id = 0;
      (void)cursor.read_uint(&id);
      list.append(id);
    }
    ids = list;
  }
  result["request_id"] = ids;
  result["priority"] = options.high_priority  ? py::object(py::str("high"))
                       : options.low_priority ? py::object(py::str("low"))
                                              : py::object(py::none());
  result["timings"] = options.timings;
  result["no_cache"] = options.no_cache;
  result["traceparent"] = py::none();
  if (const TraceParent& trace = options.trace; trace.span != 0)
    result["traceparent"] = py::make_tuple(trace.trace_high, trace.trace_low, trace.span, trace.sampled);
  return result;
}

py::dict decode_predict_dict(std::string_view params, const py::dict& kinds) {
  auto call = std::make_unique<PredictCall>();
  check(decode_predict(cursor_of(params), call.get()));
  py::dict result;
  result["model"] = py::str(call->model.data(), call->model.size());
  result["rows"] = call->rows;
  result["entities"] = columns_of(call->entities, "entities", kinds);
  result["inputs"] = columns_of(call->inputs, "inputs", kinds);
  result["options"] = options_of(call->options);
  return result;
}

py::dict decode_vectors_dict(std::string_view params) {
  VectorsCall call;
  check(decode_predict_vectors(cursor_of(params), &call));
  py::dict result;
  result["model"] = py::str(call.model.data(), call.model.size());
  result["data"] = py::bytes(reinterpret_cast<const char*>(call.data), call.bytes);
  result["rows"] = call.rows;
  result["options"] = options_of(call.options);
  return result;
}

constexpr const char* kKindNames[] = {"predict", "predict_vectors", "cancel", "other", "notification",
                                      "bad",     "framing_error"};

py::object next_message(Session& session) {
  Message message;
  if (!session.next_message(&message)) return py::none();
  py::object msgid = py::none();
  py::object status = py::none();
  if (message.has_msgid) msgid = py::int_(message.msgid);
  if (!message.status.is_ok())
    status = py::make_tuple(code_name(message.status.code), message.status.message);
  const uint8_t* params = message.params.position();
  return py::make_tuple(kKindNames[static_cast<int>(message.kind)], msgid,
                        py::str(message.method.data(), message.method.size()),
                        py::bytes(reinterpret_cast<const char*>(params), message.params.end() - params),
                        status);
}

void feed(Session& session, std::string_view bytes) {
  while (!bytes.empty()) {
    const std::span<uint8_t> room = session.get_buffer(bytes.size());
    if (room.empty())
      throw std::runtime_error("no room for input: pull messages first, or the session is closed");
    const size_t n = std::min(room.size(), bytes.size());
    std::memcpy(room.data(), bytes.data(), n);
    session.advance(n);
    bytes.remove_prefix(n);
  }
}

bool reply_scores(Session& session, uint32_t msgid, const std::vector<double>& scores,
                  const std::string& version, const std::vector<uint64_t>& request_ids,
                  const std::optional<std::vector<uint8_t>>& status,
                  const std::vector<std::pair<std::string, int64_t>>& timings, bool as_bin_f32) {
  const size_t rows = request_ids.size();
  if (rows == 0 ? !scores.empty() : scores.size() % rows != 0) {
    throw py::value_error("scores has " + std::to_string(scores.size()) + " values; expected a multiple of " +
                          std::to_string(rows));
  }
  if (status && status->size() != rows) {
    throw py::value_error("status has " + std::to_string(status->size()) + " values; expected " +
                          std::to_string(rows));
  }
  std::vector<Timing> stages;
  for (const auto& [stage, nanoseconds] : timings) stages.push_back({stage, nanoseconds});
  ScoresReply reply;
  reply.scores = scores.data();
  reply.n_rows = static_cast<uint32_t>(rows);
  reply.n_outputs = rows == 0 ? 1 : static_cast<uint32_t>(scores.size() / rows);
  reply.version = version;
  reply.request_ids = request_ids.data();
  reply.status = status ? status->data() : nullptr;
  reply.timings = stages;
  reply.as_bin_f32 = as_bin_f32;
  return encode_scores(session.out(), msgid, reply);
}

}  // namespace

void bind_wire(py::module_& m) {
  m.def("wire_transcode", &transcode, py::arg("message"),
        "Re-encode one MessagePack value (bytes) in smallest form. ValueError if it is not one whole value.");
  m.def("wire_decode_predict", &decode_predict_dict, py::arg("params"), py::arg("kinds") = py::dict(),
        "Decode the params of `predict`: dict of model, rows, entities, inputs, options. `kinds` maps a "
        "column to "
        "int64 (default), float64, bool or string. ValueError names field, value and expectation.");
  m.def("wire_decode_predict_vectors", &decode_vectors_dict, py::arg("params"),
        "Decode the params of `predict_vectors`: dict of model, data (bytes), rows, options. ValueError as "
        "above.");
  py::class_<Session>(m, "WireSession",
                      "One connection's framing, requests in flight and output. One thread.")
      .def(py::init([](size_t max_message_bytes, uint32_t max_depth, uint32_t max_in_flight,
                       size_t max_output_bytes) {
             return std::make_unique<Session>(
                 SessionLimits{{max_message_bytes, max_depth}, max_in_flight, max_output_bytes});
           }),
           py::arg("max_message_bytes") = size_t{16} << 20, py::arg("max_depth") = 16,
           py::arg("max_in_flight") = 1024, py::arg("max_output_bytes") = size_t{64} << 20)
      .def(
          "get_buffer",
          [](Session& session, size_t hint) {
            static uint8_t none;
            const std::span<uint8_t> room = session.get_buffer(hint);
            return py::memoryview::from_memory(room.empty() ? &none : room.data(),
                                               static_cast<py::ssize_t>(room.size()), false);
          },
          py::arg("hint") = Session::kChunk, py::keep_alive<0, 1>(),
          "Writable memoryview for the next read; valid until the next get_buffer or feed. Empty: no room.")
      .def("advance", &Session::advance, py::arg("n"), "`n` bytes were written into the last get_buffer.")
      .def("feed", &feed, py::arg("data"),
           "Copy bytes in. RuntimeError when there is no room or it is closed.")
      .def("next_message", &next_message,
           "(kind, msgid | None, method, params bytes, (code, message) | None), or None when none is "
           "complete.")
      .def("finish", &Session::finish, py::arg("msgid"), "The request is answered; False if not in flight.")
      .def("reply_scores", &reply_scores, py::arg("msgid"), py::arg("scores"), py::arg("version"),
           py::arg("request_ids"), py::arg("status") = py::none(),
           py::arg("timings") = std::vector<std::pair<std::string, int64_t>>{}, py::arg("as_bin_f32") = false,
           "Append a scores response (scores row-major float64). False: the output limit is hit.")
      .def(
          "reply_error",
          [](Session& session, std::optional<uint32_t> msgid, const std::string& code,
             const std::string& message, bool retryable, std::optional<int64_t> retry_after_ms) {
            return encode_error(session.out(), msgid, {code_of(code), message}, retryable,
                                retry_after_ms.value_or(-1));
          },
          py::arg("msgid"), py::arg("code"), py::arg("message"), py::arg("retryable"),
          py::arg("retry_after_ms") = py::none(), "Append an error response. False: the output limit is hit.")
      .def(
          "reply_raw",
          [](Session& session, uint32_t msgid, std::string_view result) {
            return encode_raw_result(session.out(), msgid, result);
          },
          py::arg("msgid"), py::arg("result"), "Append a response whose result is MessagePack bytes already.")
      .def(
          "goaway",
          [](Session& session, uint64_t grace_ms) { return encode_goaway(session.out(), grace_ms); },
          py::arg("grace_ms"), "Append the goaway notification. False: the output limit is hit.")
      .def(
          "take_output",
          [](Session& session) -> py::object {
            const Writer* out = session.take_output();
            if (out == nullptr) return py::none();
            return bytes_of(*out);
          },
          "Bytes to send, or None when there are none or earlier ones are not sent yet.")
      .def("output_sent", &Session::output_sent, "The bytes of take_output are sent.")
      .def_property_readonly("pending_output_bytes", &Session::pending_output_bytes)
      .def_property_readonly("unfinished_bytes", &Session::unfinished_bytes)
      .def_property_readonly("in_flight", &Session::in_flight)
      .def_property_readonly("closed", &Session::closed)
      .def_property_readonly("dropped", &Session::dropped)
      .def_property_readonly("input_capacity", &Session::input_capacity);
}

}  // namespace penstock::bind
