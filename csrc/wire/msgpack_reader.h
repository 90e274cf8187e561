// Reading MessagePack: FrameScanner finds where one value ends in a stream that arrives in pieces; Cursor
// pulls typed values from a complete message. Neither allocates, recurses or trusts a length that it reads.
// One thread at a time may use an object; different objects are independent.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace penstock::wire {

enum class Type : uint8_t {
  kNil,
  kBool,
  kUint,
  kNegative,
  kFloat32,
  kFloat64,
  kStr,
  kBin,
  kExt,
  kArray,
  kMap
};

// Name of a type in an error message.
const char* type_name(Type type);

// The head of one value: what it is, how long its own bytes are and how many values it announces.
struct Head {
  Type type = Type::kNil;
  uint8_t head_bytes = 1;
  int8_t ext_type = 0;
  uint64_t payload_bytes = 0;  // bytes after the head (str, bin, ext)
  uint64_t children = 0;       // values after the head; a map entry counts two
  uint64_t bits = 0;           // the value: bool, unsigned, two's complement, or the float's bits
};

enum class HeadResult : uint8_t { kOk, kNeedMore, kReserved };
// Parses the head at `p`, of which `available` bytes may be read.
HeadResult parse_head(const uint8_t* p, size_t available, Head* head);

struct ScanLimits {
  size_t max_message_bytes = size_t{16} << 20;
  uint32_t max_depth = 16;  // containers open at once; at most FrameScanner::kMaxDepth
};

enum class ScanResult : uint8_t { kNeedMore, kComplete, kReserved, kTooLarge, kTooDeep };

class FrameScanner {
 public:
  static constexpr uint32_t kMaxDepth = 64;

  explicit FrameScanner(const ScanLimits& limits);

  // `data` is the message from its first byte, `size` bytes of it have arrived. Call again with more bytes
  // (the data may have moved) after kNeedMore; work already done is not repeated. A message that can only end
  // beyond the limit is refused as soon as its heads say so.
  ScanResult scan(const uint8_t* data, size_t size);
  // After kComplete: the length of the message.
  size_t message_bytes() const { return static_cast<size_t>(position_); }
  void reset();

 private:
  uint64_t max_bytes_;
  uint32_t max_depth_;
  uint64_t position_ = 0;     // end of what has been understood; may lie beyond the bytes present
  uint64_t outstanding_ = 1;  // values announced and not yet read: each takes a byte at least
  uint32_t depth_ = 0;
  uint64_t remaining_[kMaxDepth];
};

// A position in a complete message. Every read returns false, and leaves the position, when the next value
// has another type or the bytes end. Views point into the message.
class Cursor {
 public:
  Cursor() = default;
  Cursor(const uint8_t* begin, const uint8_t* end) : p_(begin), end_(end) {}

  bool at_end() const { return p_ == end_; }
  const uint8_t* position() const { return p_; }
  const uint8_t* end() const { return end_; }

  // Reads a head without moving; false at the end, in a cut value and at the reserved byte.
  bool peek(Head* head) const;
  bool read_nil();
  bool read_bool(bool* value);
  bool read_uint(uint64_t* value);
  bool read_int(int64_t* value);    // false too for an integer beyond int64
  bool read_float(double* value);   // float32 or float64
  bool read_number(double* value);  // a float or any integer, the nearest double
  bool read_str(std::string_view* value);
  bool read_bin(const uint8_t** data, size_t* size);
  bool read_ext(int8_t* type, const uint8_t** data, size_t* size);
  bool read_array(uint32_t* count);
  bool read_map(uint32_t* pairs);
  // Passes one value with everything in it.
  bool skip();

 private:
  bool take(Type type, Head* head);

  const uint8_t* p_ = nullptr;
  const uint8_t* end_ = nullptr;
};

// True when `text` is well-formed UTF-8 (no overlong form, surrogate or value beyond U+10FFFF).
bool is_utf8(std::string_view text);

}  // namespace penstock::wire
