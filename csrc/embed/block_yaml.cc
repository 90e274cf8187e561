#include "embed/block_yaml.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace penstock {
namespace {

constexpr int kMaxDepth = 16;
constexpr size_t kMaxKeys = 1000;  // of one mapping
// No plain scalar begins with one of these.
constexpr std::string_view kIndicators = ",[]{}#&*!|>'\"%@`";

// The bytes of the character at text[at], 0 where there is none in UTF-8.
size_t utf8_size(std::string_view text, size_t at, uint32_t* point) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[at + i]); };
  const uint8_t first = byte(0);
  const size_t size = first < 0x80   ? 1
                      : first < 0xC2 ? 0
                      : first < 0xE0 ? 2
                      : first < 0xF0 ? 3
                      : first < 0xF5 ? 4
                                     : 0;
  if (size == 0 || text.size() - at < size) return 0;
  uint32_t value = size == 1 ? first : first & (0x7Fu >> size);
  for (size_t i = 1; i < size; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return 0;
    value = value << 6 | (byte(i) & 0x3F);
  }
  constexpr uint32_t kLeast[] = {0, 0, 0x80, 0x800, 0x10000};
  if (value < kLeast[size] || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000)) return 0;
  *point = value;
  return size;
}

void append_utf8(uint32_t point, std::string* out) {
  const auto put = [out](uint32_t byte) { *out += static_cast<char>(byte); };
  if (point < 0x80) return put(point);
  if (point < 0x800) {
    put(0xC0 | point >> 6);
  } else if (point < 0x10000) {
    put(0xE0 | point >> 12);
    put(0x80 | (point >> 6 & 0x3F));
  } else {
    put(0xF0 | point >> 18);
    put(0x80 | (point >> 12 & 0x3F));
    put(0x80 | (point >> 6 & 0x3F));
  }
  put(0x80 | (point & 0x3F));
}

class Parser {
 public:
  Parser(std::string_view text, const std::vector<std::string_view>& passed_over)
      : text_(text), passed_over_(passed_over) {}

  Status run(YamlNode* out) {
    if (Status status = check_characters(); !status.is_ok()) return status;
    if (at_end() || !parse_map(0, false, 0, out) || !(at_end() || fail("is not indented as a key is"))) {
      if (error_.empty()) fail("there is no mapping");
      const auto line = 1 + std::count(text_.begin(), text_.begin() + static_cast<ptrdiff_t>(at_), '\n');
      return Status::invalid("line " + std::to_string(line) + ": " + error_);
    }
    return {};
  }

 private:
  // Line ends other than \n, tabs and control characters are never written as they are.
  Status check_characters() {
    for (size_t size; at_ < text_.size(); at_ += size) {
      uint32_t point = 0;
      size = utf8_size(text_, at_, &point);
      if (size == 0) return Status::invalid("byte " + std::to_string(at_) + " is not UTF-8");
      if ((point < 0x20 && point != '\n') || (point >= 0x7F && point < 0xA0) || point == 0x2028 ||
          point == 0x2029 || point == 0xFEFF) {
        return Status::invalid("byte " + std::to_string(at_) + " is a control character");
      }
    }
    at_ = 0;
    return {};
  }

  bool fail(std::string_view what) {
    if (error_.empty()) error_ = what;
    return false;
  }

  bool at_end() const { return at_ == text_.size(); }
  char peek(size_t ahead = 0) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\n'; }
  bool item_at(size_t at) const {
    return at < text_.size() && text_[at] == '-' && (at + 1 == text_.size() || text_[at + 1] == ' ');
  }
  // Spaces at the beginning of the line at `at`, or -1 where no line follows.
  int indent_at(size_t at) const {
    if (at >= text_.size()) return -1;
    const size_t first = text_.find_first_not_of(' ', at);
    return static_cast<int>((first == std::string_view::npos ? text_.size() : first) - at);
  }
  bool end_line() {
    if (at_end()) return true;
    if (text_[at_] != '\n') return fail("something follows a value");
    ++at_;
    return true;
  }

  bool parse_node(int indent, int depth, YamlNode* out) {
    if (depth > kMaxDepth) return fail("is nested too deep");
    const auto column = static_cast<size_t>(indent);
    return item_at(at_ + column) ? parse_list(indent, false, depth, out)
                                 : parse_map(indent, false, depth, out);
  }

  // `inside`: the first key or item stands where we are, behind the "- " of an item.
  bool parse_map(int indent, bool inside, int depth, YamlNode* out) {
    out->kind = YamlNode::Kind::kMap;
    for (;; inside = false) {
      if (!inside) {
        const int found = indent_at(at_);
        if (found < indent) return true;
        if (found > indent) return fail("is indented more than its neighbours");
        at_ += static_cast<size_t>(indent);
      }
      std::string key;
      if (!parse_key(&key)) return false;
      if (out->fields.size() == kMaxKeys) return fail("a mapping has too many keys");
      if (out->field(key) != nullptr) return fail("key " + key + " is there twice");
      out->fields.push_back({std::move(key), {}});
      auto& [name, value] = out->fields.back();
      if (depth == 0 && std::find(passed_over_.begin(), passed_over_.end(), name) != passed_over_.end()) {
        pass_over();
      } else if (!parse_value(indent, depth, &value)) {
        return false;
      }
    }
  }

  bool parse_list(int indent, bool inside, int depth, YamlNode* out) {
    out->kind = YamlNode::Kind::kList;
    for (;; inside = false) {
      if (!inside) {
        const int found = indent_at(at_);
        if (found < indent || (found == indent && !item_at(at_ + static_cast<size_t>(indent)))) return true;
        if (found > indent) return fail("is indented more than its neighbours");
        at_ += static_cast<size_t>(indent);
      }
      if (!item_at(at_) || peek(1) != ' ' || depth >= kMaxDepth) return fail("is no item of a list");
      at_ += 2;
      YamlNode& item = out->items.emplace_back();
      if (item_at(at_)) {
        if (!parse_list(indent + 2, true, depth + 1, &item)) return false;
      } else if (key_here()) {
        if (!parse_map(indent + 2, true, depth + 1, &item)) return false;
      } else if (!parse_inline(indent, &item)) {
        return false;
      }
    }
  }

  // What stands behind "key:".
  bool parse_value(int indent, int depth, YamlNode* out) {
    if (!at_end() && peek() == ' ') {
      ++at_;
      return parse_inline(indent, out);
    }
    if (!end_line()) return false;
    const int found = indent_at(at_);
    if (found == indent && item_at(at_ + static_cast<size_t>(indent)))
      return parse_list(indent, false, depth + 1, out);
    if (found <= indent) return fail("a key has no value");
    return parse_node(found, depth + 1, out);
  }

  bool parse_inline(int indent, YamlNode* out) {
    if ((peek() == '{' && peek(1) == '}') || (peek() == '[' && peek(1) == ']')) {
      out->kind = peek() == '{' ? YamlNode::Kind::kMap : YamlNode::Kind::kList;
      at_ += 2;
      return end_line();
    }
    if (peek() == '\'' || peek() == '"') {
      out->quoted = true;
      return parse_quoted(&out->text) && end_line();
    }
    return parse_plain(indent, &out->text);
  }

  void pass_over() {
    do {
      const size_t end = text_.find('\n', at_);
      at_ = end == std::string_view::npos ? text_.size() : end + 1;
    } while (!at_end() && (peek() == ' ' || peek() == '\n' || item_at(at_)));
  }

  bool plain_begins() const {
    return peek() != '\n' && peek() != ' ' && kIndicators.find(peek()) == std::string_view::npos &&
           !((peek() == '-' || peek() == '?' || peek() == ':') && (peek(1) == ' ' || peek(1) == '\n'));
  }

  std::string_view line() const { return text_.substr(at_, text_.find('\n', at_) - at_); }

  // Whether a key and its colon stand here.
  bool key_here() {
    const size_t before = at_;
    std::string ignored;
    const bool found = parse_key(&ignored);
    at_ = before;
    if (!found) error_.clear();
    return found;
  }

  bool parse_key(std::string* key) {
    if (peek() == '\'' || peek() == '"') {
      if (!parse_quoted(key)) return false;
    } else {
      const std::string_view rest = line();
      size_t colon = rest.find(": ");
      if (colon == std::string_view::npos && rest.ends_with(':')) colon = rest.size() - 1;
      if (colon == std::string_view::npos || !plain_begins()) return fail("expected a key and a colon");
      if (rest.substr(0, colon).find(" #") != std::string_view::npos) return fail("there is a comment");
      key->assign(rest.substr(0, colon));
      at_ += colon;
    }
    if (peek() != ':' || (peek(1) != ' ' && peek(1) != '\n')) return fail("expected a key and a colon");
    ++at_;
    return true;
  }

  bool parse_plain(int indent, std::string* out) {
    if (!plain_begins()) return fail("expected a value in the form that save_bundle writes");
    for (;;) {
      std::string_view part = line();
      at_ += part.size();
      while (part.ends_with(' ')) part.remove_suffix(1);
      if (part.find(": ") != std::string_view::npos || part.ends_with(':') ||
          part.find(" #") != std::string_view::npos || part.starts_with('#')) {
        return fail("a plain value has a comment or a colon");
      }
      *out += part;
      if (!end_line()) return false;
      const int found = indent_at(at_);
      const size_t first = at_ + static_cast<size_t>(std::max(found, 0));
      if (found <= indent || first >= text_.size() || text_[first] == '\n') return true;
      at_ = first;
      *out += ' ';
    }
  }

  // A line end inside quotes: spaces around it go; one is a space, of more all but the first stay.
  bool fold(std::string* out, size_t keep, bool escaped) {
    while (out->size() > keep && out->back() == ' ') out->pop_back();
    size_t ends = 0;
    while (!at_end() && (peek() == '\n' || peek() == ' ')) {
      ends += peek() == '\n';
      ++at_;
    }
    if (ends == 1 && !escaped) *out += ' ';
    out->append(ends - 1, '\n');
    return true;
  }

  bool parse_quoted(std::string* out) {
    const char quote = text_[at_++];
    size_t keep = 0;  // what an escape wrote is no space that a line end takes away
    while (!at_end()) {
      const char c = text_[at_];
      if (c == '\n') {
        fold(out, keep, false);
      } else if (c == quote) {
        ++at_;
        if (quote == '"' || at_end() || peek() != '\'') return true;
        *out += '\'';
        ++at_;
      } else if (c == '\\' && quote == '"') {
        ++at_;
        if (at_end() || !parse_escape(out)) return fail("there is an unknown escape");
        keep = out->size();
      } else {
        *out += c;
        ++at_;
      }
    }
    return fail("a quoted value has no end");
  }

  bool parse_escape(std::string* out) {
    if (peek() == '\n') return fold(out, out->size(), true);
    constexpr std::string_view kNames = "0abtnvfre \"\\/N_LP";
    constexpr uint32_t kPoints[] = {0,   7,   8,    9,   10,   11,   12,     13,    27,
                                    ' ', '"', '\\', '/', 0x85, 0xA0, 0x2028, 0x2029};
    const char name = text_[at_++];
    if (const size_t known = kNames.find(name); known != std::string_view::npos) {
      append_utf8(kPoints[known], out);
      return true;
    }
    const size_t digits = name == 'x' ? 2 : name == 'u' ? 4 : name == 'U' ? 8 : 0;
    if (digits == 0 || text_.size() - at_ < digits) return false;
    uint32_t point = 0;
    for (size_t i = 0; i < digits; ++i) {
      const char c = text_[at_++];
      const uint32_t digit = c >= '0' && c <= '9'   ? static_cast<uint32_t>(c - '0')
                             : c >= 'a' && c <= 'f' ? static_cast<uint32_t>(c - 'a') + 10
                             : c >= 'A' && c <= 'F' ? static_cast<uint32_t>(c - 'A') + 10
                                                    : 16;
      if (digit == 16 || point >> 28 != 0) return false;
      point = point << 4 | digit;
    }
    if (point > 0x10FFFF || (point >= 0xD800 && point < 0xE000)) return false;
    append_utf8(point, out);
    return true;
  }

  const std::string_view text_;
  const std::vector<std::string_view>& passed_over_;
  size_t at_ = 0;
  std::string error_;
};

}  // namespace

const YamlNode* YamlNode::field(std::string_view key) const {
  for (const auto& [name, value] : fields) {
    if (name == key) return &value;
  }
  return nullptr;
}

Status parse_block_yaml(std::string_view text, const std::vector<std::string_view>& passed_over,
                        YamlNode* out) {
  *out = {};
  return Parser(text, passed_over).run(out);
}

std::string_view top_level_line(std::string_view text, std::string_view key) {
  for (size_t at = 0; at < text.size();) {
    std::string_view line = text.substr(at, text.find('\n', at) - at);
    at += line.size() + 1;
    if (!line.starts_with(key) || !line.substr(key.size()).starts_with(": ")) continue;
    line.remove_prefix(key.size() + 2);
    while (line.ends_with(' ')) line.remove_suffix(1);
    return line;
  }
  return {};
}

}  // namespace penstock
