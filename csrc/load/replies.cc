#include "load/replies.h"

#include <bit>
#include <charconv>
#include <cmath>
#include <cstring>

namespace penstock::load {
namespace {

using wire::Cursor;

constexpr size_t kMaxHttpHead = 64 << 10;
constexpr size_t kMaxHttpBody = 16 << 20;
constexpr int kMaxDepth = 16;

std::string_view text_of(std::span<const uint8_t> bytes) {
  return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
}

template <class Float>
bool take_raw(std::span<const uint8_t> bytes, Judge* judge) {
  for (size_t i = 0; i + sizeof(Float) <= bytes.size(); i += sizeof(Float)) {
    Float value;
    std::memcpy(&value, bytes.data() + i, sizeof(Float));
    if (!judge->take(value)) return false;
  }
  return bytes.size() % sizeof(Float) == 0;
}

// Takes every number of the value at `cursor`, in order.
bool take_msgpack(Cursor& cursor, Judge* judge, int depth) {
  if (depth == kMaxDepth) return false;
  double number;
  if (cursor.read_number(&number)) return judge->take(number);
  const uint8_t* data;
  size_t size;
  if (cursor.read_bin(&data, &size)) return take_raw<float>({data, size}, judge);
  uint32_t count;
  if (cursor.read_array(&count)) {
    for (uint32_t i = 0; i < count; ++i) {
      if (!take_msgpack(cursor, judge, depth + 1)) return false;
    }
    return true;
  }
  if (cursor.read_map(&count)) {
    for (uint32_t i = 0; i < count; ++i) {
      if (!cursor.skip() || !take_msgpack(cursor, judge, depth + 1)) return false;
    }
    return true;
  }
  return cursor.skip();  // text, nil, bool
}

// Takes the numbers of JSON text: after the key's value begins, or from the front. Strings are passed over.
bool take_json(std::string_view text, std::string_view key, Judge* judge) {
  if (!key.empty()) {
    size_t at = 0;
    for (;;) {
      at = text.find(key, at);
      if (at == std::string_view::npos) return false;
      const bool quoted =
          at > 0 && text[at - 1] == '"' && at + key.size() < text.size() && text[at + key.size()] == '"';
      at += key.size();
      if (quoted) break;
    }
    text.remove_prefix(at + 1);
  }
  const char* p = text.data();
  const char* const end = p + text.size();
  while (p < end && !judge->complete()) {
    if (*p == '"') {
      for (++p; p < end && *p != '"'; ++p) {
        if (*p == '\\' && p + 1 < end) ++p;
      }
      if (p < end) ++p;
    } else if (*p == '-' || (*p >= '0' && *p <= '9')) {
      double value;
      const auto [after, fault] = std::from_chars(p, end, value);
      if (fault != std::errc() || !judge->take(value)) return false;
      p = after;
    } else {
      ++p;
    }
  }
  return true;
}

bool equals_lower(std::string_view text, std::string_view lower) {
  if (text.size() != lower.size()) return false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if ((c >= 'A' && c <= 'Z' ? c + 32 : c) != lower[i]) return false;
  }
  return true;
}

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

struct HttpHead {
  int status = 0;
  size_t length = 0;
  bool has_length = false, chunked = false, closes = false;
};

// `head` is the status line and the header lines, the empty line not among them.
bool parse_head(std::string_view head, HttpHead* out) {
  if (head.size() < 12 || !head.starts_with("HTTP/1.") || head[8] != ' ') return false;
  const auto [after, fault] = std::from_chars(head.data() + 9, head.data() + 12, out->status);
  if (fault != std::errc() || after != head.data() + 12) return false;
  out->closes = head[7] == '0';
  for (size_t at = head.find("\r\n"); at != std::string_view::npos;) {
    at += 2;
    const size_t end = head.find("\r\n", at);
    const std::string_view line = head.substr(at, end == std::string_view::npos ? end : end - at);
    at = end;
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos) return false;
    const std::string_view name = line.substr(0, colon), value = trimmed(line.substr(colon + 1));
    if (equals_lower(name, "content-length")) {
      const auto [stop, wrong] = std::from_chars(value.data(), value.data() + value.size(), out->length);
      if (wrong != std::errc() || stop != value.data() + value.size()) return false;
      out->has_length = true;
    } else if (equals_lower(name, "transfer-encoding")) {
      out->chunked = equals_lower(value, "chunked");
      if (!out->chunked) return false;
    } else if (equals_lower(name, "connection")) {
      if (equals_lower(value, "close")) out->closes = true;
      if (equals_lower(value, "keep-alive")) out->closes = false;
    }
  }
  return true;
}

// Joins the chunks at `at`; *end is behind the last.
Found join_chunks(std::string_view text, size_t at, std::vector<uint8_t>* out, size_t* end) {
  out->clear();
  for (;;) {
    const size_t line = text.find("\r\n", at);
    if (line == std::string_view::npos) return text.size() - at > 1024 ? Found::kBroken : Found::kNeedMore;
    size_t size = 0;
    const auto [after, fault] = std::from_chars(text.data() + at, text.data() + line, size, 16);
    if (fault != std::errc() || (after != text.data() + line && *after != ';')) return Found::kBroken;
    if (size > kMaxHttpBody - out->size()) return Found::kBroken;
    at = line + 2;
    if (size == 0) break;
    if (text.size() - at < size + 2) return Found::kNeedMore;
    if (text.substr(at + size, 2) != "\r\n") return Found::kBroken;
    out->insert(out->end(), text.begin() + static_cast<ptrdiff_t>(at),
                text.begin() + static_cast<ptrdiff_t>(at + size));
    at += size + 2;
  }
  for (;;) {  // trailers
    const size_t line = text.find("\r\n", at);
    if (line == std::string_view::npos) return text.size() - at > 1024 ? Found::kBroken : Found::kNeedMore;
    const bool last = line == at;
    at = line + 2;
    if (last) break;
  }
  *end = at;
  return Found::kReply;
}

}  // namespace

bool Judge::take(double score) {
  if (expected.empty()) return true;
  if (taken == expected.size()) return false;
  const double error = std::fabs(score - expected[taken]);
  if (!(error <= tolerance)) return false;
  ++taken;
  if (error > *max_error) *max_error = error;
  return true;
}

Found RpcReplies::next(std::span<const uint8_t> stream, Reply* reply) {
  switch (scanner_.scan(stream.data(), stream.size())) {
    case wire::ScanResult::kNeedMore:
      return Found::kNeedMore;
    case wire::ScanResult::kComplete:
      break;
    default:
      return Found::kBroken;
  }
  reply->bytes = scanner_.message_bytes();
  scanner_.reset();
  Cursor cursor(stream.data(), stream.data() + reply->bytes);
  uint32_t size;
  uint64_t kind, msgid;
  if (!cursor.read_array(&size) || !cursor.read_uint(&kind)) return Found::kBroken;
  if (kind == 2) {
    std::string_view method;
    if (size != 3 || !cursor.read_str(&method)) return Found::kBroken;
    reply->goaway = method == "goaway";
    return Found::kNotification;
  }
  // A fault that the server could not place has nil for a msgid: nothing after it can be trusted.
  if (kind != 1 || size != 4 || !cursor.read_uint(&msgid) || msgid > UINT32_MAX) return Found::kBroken;
  reply->msgid = static_cast<uint32_t>(msgid);
  reply->error = cursor;
  return Found::kReply;
}

Outcome judge_rpc(const Reply& reply, Judge* judge, std::string_view* other_code) {
  Cursor cursor = reply.error;
  uint32_t pairs;
  std::string_view key;
  if (!cursor.read_nil()) {
    std::string_view code;
    if (cursor.read_map(&pairs)) {
      for (uint32_t i = 0; i < pairs && cursor.read_str(&key); ++i) {
        if (key == "code" ? !cursor.read_str(&code) : !cursor.skip()) break;
        if (!code.empty()) break;
      }
    } else {
      (void)cursor.read_str(&code);
    }
    for (uint8_t i = 1; i <= static_cast<uint8_t>(Code::kInternal); ++i) {
      if (code == code_name(static_cast<Code>(i))) return static_cast<Outcome>(i);
    }
    *other_code = code;
    return Outcome::kOtherError;
  }
  if (judge->expected.empty()) return Outcome::kOk;
  if (!cursor.read_map(&pairs)) {  // a server of another kind: the result is the scores
    return take_msgpack(cursor, judge, 0) && judge->complete() ? Outcome::kOk : Outcome::kWrong;
  }
  for (uint32_t i = 0; i < pairs && cursor.read_str(&key); ++i) {
    if (key == "scores") {
      return take_msgpack(cursor, judge, 0) && judge->complete() ? Outcome::kOk : Outcome::kWrong;
    }
    if (!cursor.skip()) break;
  }
  return Outcome::kWrong;
}

bool judge_body(std::span<const uint8_t> body, BodyFormat format, std::string_view json_key, Judge* judge) {
  if (format == BodyFormat::kNone || judge->expected.empty()) return true;
  bool taken = false;
  switch (format) {
    case BodyFormat::kNone:
      break;
    case BodyFormat::kFloat32:
      taken = take_raw<float>(body, judge);
      break;
    case BodyFormat::kFloat64:
      taken = take_raw<double>(body, judge);
      break;
    case BodyFormat::kFloat32Tail: {
      const size_t size = judge->expected.size() * sizeof(float);
      taken = body.size() >= size && take_raw<float>(body.last(size), judge);
      break;
    }
    case BodyFormat::kJson:
      taken = take_json(text_of(body), json_key, judge);
      break;
    case BodyFormat::kMsgpack: {
      wire::FrameScanner scanner(wire::ScanLimits{kMaxHttpBody, kMaxDepth});
      if (scanner.scan(body.data(), body.size()) != wire::ScanResult::kComplete) return false;
      Cursor cursor(body.data(), body.data() + body.size());
      taken = take_msgpack(cursor, judge, 0);
      break;
    }
  }
  return taken && judge->complete();
}

Found next_http(std::span<const uint8_t> stream, std::vector<uint8_t>* scratch, Reply* reply) {
  const std::string_view text = text_of(stream);
  size_t at = 0;
  for (;;) {
    const size_t head_end = text.find("\r\n\r\n", at);
    if (head_end == std::string_view::npos) {
      return text.size() - at > kMaxHttpHead ? Found::kBroken : Found::kNeedMore;
    }
    HttpHead head;
    if (!parse_head(text.substr(at, head_end - at), &head)) return Found::kBroken;
    at = head_end + 4;
    if (head.status >= 100 && head.status < 200) continue;
    reply->status = head.status;
    reply->closes = head.closes;
    if (head.chunked) {
      const Found found = join_chunks(text, at, scratch, &reply->bytes);
      reply->body = *scratch;
      return found;
    }
    const bool bodiless = head.status == 204 || head.status == 304;
    if (!bodiless && !head.has_length) return Found::kBroken;  // a body that only the connection's end bounds
    const size_t length = bodiless ? 0 : head.length;
    if (length > kMaxHttpBody) return Found::kBroken;
    if (text.size() - at < length) return Found::kNeedMore;
    reply->body = stream.subspan(at, length);
    reply->bytes = at + length;
    return Found::kReply;
  }
}

}  // namespace penstock::load
