#include "wire/msgpack_reader.h"

#include <algorithm>
#include <bit>
#include <limits>

namespace penstock::wire {
namespace {

uint64_t load_big_endian(const uint8_t* p, size_t bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < bytes; ++i) value = value << 8 | p[i];
  return value;
}

}  // namespace

const char* type_name(Type type) {
  constexpr const char* kNames[] = {"nil",    "bool",   "int", "int",  "float", "float",
                                    "string", "binary", "ext", "list", "map"};
  return kNames[static_cast<uint8_t>(type)];
}

HeadResult parse_head(const uint8_t* p, size_t available, Head* head) {
  if (available == 0) return HeadResult::kNeedMore;
  const uint8_t tag = p[0];
  *head = Head{};
  // The operand of a tag: `bytes` of big-endian number that follow it.
  const auto operand = [&](size_t bytes, uint64_t* value) {
    if (available < 1 + bytes) return false;
    head->head_bytes = static_cast<uint8_t>(1 + bytes);
    *value = load_big_endian(p + 1, bytes);
    return true;
  };
  const auto done = [](bool complete) { return complete ? HeadResult::kOk : HeadResult::kNeedMore; };

  if (tag <= 0x7f) {
    head->type = Type::kUint;
    head->bits = tag;
    return HeadResult::kOk;
  }
  if (tag >= 0xe0) {
    head->type = Type::kNegative;
    head->bits = static_cast<uint64_t>(static_cast<int64_t>(static_cast<int8_t>(tag)));
    return HeadResult::kOk;
  }
  if (tag <= 0x8f) {
    head->type = Type::kMap;
    head->children = 2 * (tag & 0x0f);
    return HeadResult::kOk;
  }
  if (tag <= 0x9f) {
    head->type = Type::kArray;
    head->children = tag & 0x0f;
    return HeadResult::kOk;
  }
  if (tag <= 0xbf) {
    head->type = Type::kStr;
    head->payload_bytes = tag & 0x1f;
    return HeadResult::kOk;
  }
  switch (tag) {
    case 0xc0:
      return HeadResult::kOk;
    case 0xc1:
      return HeadResult::kReserved;
    case 0xc2:
    case 0xc3:
      head->type = Type::kBool;
      head->bits = tag & 1;
      return HeadResult::kOk;
    case 0xc4:
    case 0xc5:
    case 0xc6:
      head->type = Type::kBin;
      return done(operand(size_t{1} << (tag - 0xc4), &head->payload_bytes));
    case 0xc7:
    case 0xc8:
    case 0xc9: {
      const size_t width = size_t{1} << (tag - 0xc7);
      if (available < 2 + width) return HeadResult::kNeedMore;
      head->type = Type::kExt;
      head->payload_bytes = load_big_endian(p + 1, width);
      head->ext_type = static_cast<int8_t>(p[1 + width]);
      head->head_bytes = static_cast<uint8_t>(2 + width);
      return HeadResult::kOk;
    }
    case 0xca:
      head->type = Type::kFloat32;
      return done(operand(4, &head->bits));
    case 0xcb:
      head->type = Type::kFloat64;
      return done(operand(8, &head->bits));
    case 0xcc:
    case 0xcd:
    case 0xce:
    case 0xcf:
      head->type = Type::kUint;
      return done(operand(size_t{1} << (tag - 0xcc), &head->bits));
    case 0xd0:
    case 0xd1:
    case 0xd2:
    case 0xd3: {
      const size_t width = size_t{1} << (tag - 0xd0);
      if (!operand(width, &head->bits)) return HeadResult::kNeedMore;
      const unsigned shift = static_cast<unsigned>(64 - 8 * width);
      const int64_t value = static_cast<int64_t>(head->bits << shift) >> shift;
      // Some writers put a number >= 0 in a signed form; it is the same number.
      head->type = value < 0 ? Type::kNegative : Type::kUint;
      head->bits = static_cast<uint64_t>(value);
      return HeadResult::kOk;
    }
    case 0xd4:
    case 0xd5:
    case 0xd6:
    case 0xd7:
    case 0xd8:
      if (available < 2) return HeadResult::kNeedMore;
      head->type = Type::kExt;
      head->payload_bytes = uint64_t{1} << (tag - 0xd4);
      head->ext_type = static_cast<int8_t>(p[1]);
      head->head_bytes = 2;
      return HeadResult::kOk;
    case 0xd9:
    case 0xda:
    case 0xdb:
      head->type = Type::kStr;
      return done(operand(size_t{1} << (tag - 0xd9), &head->payload_bytes));
    case 0xdc:
    case 0xdd:
      head->type = Type::kArray;
      return done(operand(tag == 0xdc ? 2 : 4, &head->children));
    default: {  // 0xde, 0xdf
      head->type = Type::kMap;
      const bool complete = operand(tag == 0xde ? 2 : 4, &head->children);
      head->children *= 2;
      return done(complete);
    }
  }
}

FrameScanner::FrameScanner(const ScanLimits& limits)
    : max_bytes_(limits.max_message_bytes), max_depth_(std::min(limits.max_depth, kMaxDepth)) {}

void FrameScanner::reset() {
  position_ = 0;
  outstanding_ = 1;
  depth_ = 0;
}

ScanResult FrameScanner::scan(const uint8_t* data, size_t size) {
  while (outstanding_ > 0) {
    if (position_ >= size) return ScanResult::kNeedMore;
    Head head;
    const HeadResult result = parse_head(data + position_, size - static_cast<size_t>(position_), &head);
    if (result == HeadResult::kReserved) return ScanResult::kReserved;
    if (result == HeadResult::kNeedMore) return ScanResult::kNeedMore;
    const bool container = head.type == Type::kArray || head.type == Type::kMap;
    if (container && depth_ >= max_depth_) return ScanResult::kTooDeep;
    // No overflow: position and outstanding are within the limit here, a head adds less than 2^34.
    const uint64_t position = position_ + head.head_bytes + head.payload_bytes;
    const uint64_t outstanding = outstanding_ - 1 + head.children;
    if (position > max_bytes_ || outstanding > max_bytes_ - position) return ScanResult::kTooLarge;
    position_ = position;
    outstanding_ = outstanding;
    if (depth_ > 0) --remaining_[depth_ - 1];
    if (head.children > 0) remaining_[depth_++] = head.children;
    while (depth_ > 0 && remaining_[depth_ - 1] == 0) --depth_;
  }
  return position_ <= size ? ScanResult::kComplete : ScanResult::kNeedMore;
}

bool Cursor::peek(Head* head) const {
  const size_t available = static_cast<size_t>(end_ - p_);
  return parse_head(p_, available, head) == HeadResult::kOk &&
         head->payload_bytes <= available - head->head_bytes;
}

bool Cursor::take(Type type, Head* head) {
  if (!peek(head) || head->type != type) return false;
  p_ += head->head_bytes;
  return true;
}

bool Cursor::read_nil() {
  Head head;
  return take(Type::kNil, &head);
}

bool Cursor::read_bool(bool* value) {
  Head head;
  if (!take(Type::kBool, &head)) return false;
  *value = head.bits != 0;
  return true;
}

bool Cursor::read_uint(uint64_t* value) {
  Head head;
  if (!take(Type::kUint, &head)) return false;
  *value = head.bits;
  return true;
}

bool Cursor::read_int(int64_t* value) {
  Head head;
  if (!peek(&head)) return false;
  const bool fits =
      head.type == Type::kNegative ||
      (head.type == Type::kUint && head.bits <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max()));
  if (!fits) return false;
  p_ += head.head_bytes;
  *value = static_cast<int64_t>(head.bits);
  return true;
}

bool Cursor::read_float(double* value) {
  Head head;
  if (!peek(&head)) return false;
  if (head.type == Type::kFloat64) {
    *value = std::bit_cast<double>(head.bits);
  } else if (head.type == Type::kFloat32) {
    *value = std::bit_cast<float>(static_cast<uint32_t>(head.bits));
  } else {
    return false;
  }
  p_ += head.head_bytes;
  return true;
}

bool Cursor::read_number(double* value) {
  uint64_t magnitude;
  int64_t number;
  if (read_float(value)) return true;
  if (read_int(&number)) {
    *value = static_cast<double>(number);
    return true;
  }
  if (read_uint(&magnitude)) {
    *value = static_cast<double>(magnitude);
    return true;
  }
  return false;
}

bool Cursor::read_str(std::string_view* value) {
  Head head;
  if (!take(Type::kStr, &head)) return false;
  *value = {reinterpret_cast<const char*>(p_), static_cast<size_t>(head.payload_bytes)};
  p_ += head.payload_bytes;
  return true;
}

bool Cursor::read_bin(const uint8_t** data, size_t* size) {
  Head head;
  if (!take(Type::kBin, &head)) return false;
  *data = p_;
  *size = static_cast<size_t>(head.payload_bytes);
  p_ += head.payload_bytes;
  return true;
}

bool Cursor::read_ext(int8_t* type, const uint8_t** data, size_t* size) {
  Head head;
  if (!take(Type::kExt, &head)) return false;
  *type = head.ext_type;
  *data = p_;
  *size = static_cast<size_t>(head.payload_bytes);
  p_ += head.payload_bytes;
  return true;
}

bool Cursor::read_array(uint32_t* count) {
  Head head;
  if (!take(Type::kArray, &head)) return false;
  *count = static_cast<uint32_t>(head.children);
  return true;
}

bool Cursor::read_map(uint32_t* pairs) {
  Head head;
  if (!take(Type::kMap, &head)) return false;
  *pairs = static_cast<uint32_t>(head.children / 2);
  return true;
}

bool Cursor::skip() {
  Cursor probe = *this;
  // Bounded at every step by the bytes that are left, so it cannot wrap.
  uint64_t outstanding = 1;
  while (outstanding > 0) {
    Head head;
    if (!probe.peek(&head)) return false;
    probe.p_ += head.head_bytes + head.payload_bytes;
    outstanding += head.children;
    --outstanding;
    if (outstanding > static_cast<uint64_t>(probe.end_ - probe.p_)) return false;
  }
  *this = probe;
  return true;
}

bool is_utf8(std::string_view text) {
  const auto* p = reinterpret_cast<const uint8_t*>(text.data());
  const uint8_t* end = p + text.size();
  while (p < end) {
    const uint8_t lead = *p++;
    if (lead < 0x80) continue;
    const int more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
    if (lead < 0xc2 || lead > 0xf4 || end - p < more) return false;
    uint32_t point = lead & (0x3fu >> more);
    for (int i = 0; i < more; ++i) {
      if ((*p & 0xc0) != 0x80) return false;
      point = point << 6 | (*p++ & 0x3fu);
    }
    constexpr uint32_t kLeast[] = {0, 0x80, 0x800, 0x10000};
    if (point < kLeast[more] || point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff)) return false;
  }
  return true;
}

}  // namespace penstock::wire
