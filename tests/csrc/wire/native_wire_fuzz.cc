// 1e5 mutated messages through Session, decode_predict and decode_predict_vectors: none may crash, hang or
// read out of bounds (built with sanitizers too). The generator is fixed, so a failure repeats.
#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "random.h"
#include "wire/session.h"

using namespace penstock;
using namespace penstock::wire;

namespace {

void write_predict(Writer& out, uint32_t msgid) {
  out.array(4);
  out.uint(0);
  out.uint(msgid);
  out.str("predict");
  out.array(4);
  out.str("fare");
  out.map(2);
  out.str("user_id");
  out.array(3);
  for (int i = 0; i < 3; ++i) out.integer(static_cast<int64_t>(random_below(UINT64_MAX)));
  out.str("city");
  out.array(3);
  out.str("Z\xc3\xbcrich");
  out.nil();
  out.boolean(true);
  out.map(1);
  out.str("km");
  out.array(3);
  out.f64(1.5);
  out.f32(2.5f);
  out.uint(3);
  out.map(3);
  out.str("deadline_ms");
  out.uint(50);
  out.str("now");
  out.ext(-1, "\0\0\0\1\0\0\0\0\0\0\0\1", 12);
  out.str("request_id");
  out.array(3);
  for (uint64_t i = 0; i < 3; ++i) out.uint(UINT64_MAX - i);
}

void write_vectors(Writer& out, uint32_t msgid) {
  const float vectors[4] = {1, 2, 3, 4};
  out.array(4);
  out.uint(0);
  out.uint(msgid);
  out.str("predict_vectors");
  out.array(3);
  out.str("fare");
  out.bin(vectors, sizeof(vectors));
  out.uint(2);
}

uint64_t read_columns(const Columns& columns) {
  uint64_t errors = 0;
  for (uint32_t i = 0; i < columns.size; ++i) {
    const Column& column = columns.column[i];
    Cursor cursor = column.cursor();
    for (uint32_t row = 0; row < column.count; ++row) {
      const ValueLabel label{"entities", column.name, row, column.is_list};
      int64_t number;
      double real;
      bool flag, null;
      std::string_view text;
      errors += !read_int64(cursor, label, &number, &null).is_ok();
      Cursor a = cursor, b = cursor, c = cursor;
      errors += !read_f64(a, label, &real, &null).is_ok();
      errors += !read_bool(b, label, &flag, &null).is_ok();
      errors += !read_str(c, label, &text, &null).is_ok();
      if (!cursor.skip()) break;
    }
  }
  return errors;
}

}  // namespace

int main() {
  auto call = std::make_unique<PredictCall>();
  SessionLimits limits;
  limits.scan.max_message_bytes = 4096;
  limits.max_in_flight = 8;
  limits.max_output_bytes = 4096;
  auto session = std::make_unique<Session>(limits);
  uint64_t pulled = 0, decoded = 0, refused = 0, framing = 0;
  for (uint32_t round = 0; round < 100'000; ++round) {
    Writer frame(4096);
    random_below(3) == 0 ? write_vectors(frame, round) : write_predict(frame, round);
    // The exact size on the heap, so that a sanitizer sees a read of one byte more.
    std::vector<uint8_t> bytes(frame.data(), frame.data() + frame.size());
    for (uint64_t i = random_below(4); i > 0; --i) {
      bytes[random_below(bytes.size())] = static_cast<uint8_t>(random_below(256));
    }
    if (random_below(8) == 0) bytes.resize(1 + random_below(bytes.size()));
    Envelope envelope;
    if (decode_envelope(Cursor(bytes.data(), bytes.data() + bytes.size()), &envelope).is_ok()) {
      (void)decode_predict(envelope.params, call.get());
    }
    size_t sent = 0;
    while (sent < bytes.size() && !session->closed()) {
      const std::span<uint8_t> room = session->get_buffer(64);
      CHECK(!room.empty());
      const size_t n = std::min({room.size(), bytes.size() - sent, size_t{1} + random_below(64)});
      std::memcpy(room.data(), bytes.data() + sent, n);
      session->advance(n);
      sent += n;
      Message message;
      while (session->next_message(&message)) {
        ++pulled;
        if (message.kind == MessageKind::kPredict) {
          const Status status = decode_predict(message.params, call.get());
          status.is_ok() ? ++decoded : ++refused;
          if (status.is_ok()) refused += read_columns(call->entities) + read_columns(call->inputs);
        } else if (message.kind == MessageKind::kPredictVectors) {
          VectorsCall vectors;
          decode_predict_vectors(message.params, &vectors).is_ok() ? ++decoded : ++refused;
        } else if (message.kind == MessageKind::kFramingError) {
          ++framing;
          CHECK(session->closed());
        }
        const bool admitted = message.kind == MessageKind::kPredict ||
                              message.kind == MessageKind::kPredictVectors ||
                              message.kind == MessageKind::kOther;
        if (admitted) CHECK(session->finish(message.msgid));
      }
    }
    CHECK(session->in_flight() == 0);
    CHECK(session->input_capacity() <= 4096 + Session::kChunk);
    if (session->take_output() != nullptr) session->output_sent();
    if (session->closed()) session = std::make_unique<Session>(limits);
  }
  // The mutations must have reached every way out.
  CHECK(pulled > 10'000 && decoded > 1'000 && refused > 1'000 && framing > 100);
  return 0;
}
