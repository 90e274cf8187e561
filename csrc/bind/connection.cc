// Binding of engine/serving_core's Connection. The loop thread calls it with the GIL, and may let go of it
// inside received().
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "bind/backends.h"
#include "engine/serving_core.h"

namespace penstock::bind {

void bind_connection(py::module_& m) {
  py::class_<Connection>(m, "Connection", "One peer. Every call belongs to the loop thread.")
      .def_property_readonly("id", &Connection::id)
      .def(
          "get_buffer",
          [](Connection& self, py::ssize_t hint) {
            static uint8_t none;
            const std::span<uint8_t> room =
                self.session().get_buffer(hint > 0 ? static_cast<size_t>(hint) : wire::Session::kChunk);
            return py::memoryview::from_memory(room.empty() ? &none : room.data(),
                                               static_cast<py::ssize_t>(room.size()), false);
          },
          py::arg("sizehint") = -1,
          "Writable memoryview for the next read; valid until the next get_buffer, and not after the\n"
          "connection. Empty: no room.")
      .def(
          "received",
          [](Connection& self, size_t n) {
            std::vector<Connection::Call> others;
            {
              const GiveWay give_way;
              self.received(n, &others);
            }
            py::list calls(others.size());
            for (size_t i = 0; i < others.size(); ++i)
              calls[i] = py::make_tuple(others[i].msgid, others[i].method, py::bytes(others[i].params));
            return calls;
          },
          py::arg("n"),
          "n bytes were read into the last get_buffer: answers the predict calls in them, now or in wake, "
          "and\n"
          "returns the other requests as (msgid, method, params as MessagePack bytes).")
      .def("attach", &Connection::attach, py::arg("fd"),
           "Replies go straight to this connected socket from now on; its descriptor is duplicated. False:\n"
           "no descriptor is free.")
      .def("send_output", &Connection::send_output,
           "Send to the attached socket what waits. True: look after the rest, with take_output.")
      .def("watch", &Connection::watch, "Have wake tell of every output of this connection.")
      .def(
          "reply",
          [](Connection& self, uint32_t msgid, const py::bytes& result) {
            return self.reply(msgid, static_cast<std::string_view>(result));
          },
          py::arg("msgid"), py::arg("result"),
          "Answer with a MessagePack value. False: not in flight, or it does not fit and the answer is\n"
          "RESOURCE_EXHAUSTED.")
      .def(
          "reply_error",
          [](Connection& self, uint32_t msgid, const std::string& code, const std::string& message,
             bool retryable, std::optional<int64_t> retry_after_ms) {
            return self.reply_error(msgid, {code_of(code), message}, retryable, retry_after_ms.value_or(-1));
          },
          py::arg("msgid"), py::arg("code"), py::arg("message"), py::arg("retryable"),
          py::arg("retry_after_ms") = py::none())
      .def(
          "refuse",
          [](Connection& self, const std::string& code, const std::string& message) {
            return wire::encode_error(self.session().out(), std::nullopt, {code_of(code), message},
                                      is_retryable(code_of(code)));
          },
          py::arg("code"), py::arg("message"), "Append an error that answers no request (msgid nil).")
      .def(
          "goaway",
          [](Connection& self, uint64_t grace_ms) {
            return wire::encode_goaway(self.session().out(), grace_ms);
          },
          py::arg("grace_ms"))
      .def(
          "take_output",
          [](Connection& self) -> py::object {
            const std::string_view out = self.take_output();
            if (out.empty()) return py::none();
            return py::bytes(out.data(), out.size());
          },
          "Bytes to send, or None when there are none or earlier ones are not sent yet.")
      .def("output_sent", &Connection::output_sent, "The bytes of take_output are sent.")
      .def_property_readonly("pending_output_bytes",
                             [](Connection& self) { return self.session().pending_output_bytes(); })
      .def_property_readonly("in_flight", [](Connection& self) { return self.session().in_flight(); })
      .def_property_readonly("closed", &Connection::closed)
      .def_property_readonly("dropped_notifications",
                             [](Connection& self) { return self.session().dropped(); })
      .def("drop", &Connection::drop, "The peer is gone: its requests are cancelled.")
      .def("authorize", &Connection::authorize, py::arg("until_us"),
           "Predict calls are UNAUTHENTICATED from this wall-clock microsecond on; 0: at once. While they "
           "are,\n"
           "received stops after each `auth` request: decide on it, then call received(0).")
      .def("touch", &Connection::touch, "The peer was kept waiting by us: its silence counts from now on.");
}

}  // namespace penstock::bind
