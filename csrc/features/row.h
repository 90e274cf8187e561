// Columns in blocks of 64 rows, and the layout of a stored feature row.
//
// A row is row_words() 64-bit words: word 0 holds the row status in its low byte, then one validity bit a
// field, then one bit for each bool field, then the 8-byte fields, then the 4-byte fields packed two a word
// (low half first). Unused bits are zero, so equal rows are equal words. All functions are const: any thread
// may call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace penstock {

// Codes are those of a compiled program's bytes; they are never renumbered.
enum class FeatureDtype : uint8_t { kF32, kF64, kI64, kBool, kString, kTimestamp, kDuration };
constexpr uint8_t kFeatureDtypes = 7;
constexpr size_t kBlockRows = 64;

constexpr bool is_float(FeatureDtype dtype) {
  return dtype == FeatureDtype::kF32 || dtype == FeatureDtype::kF64;
}
const char* dtype_name(FeatureDtype dtype);
Status dtype_from_name(const std::string& name, FeatureDtype* out);

// Up to 64 values of one column: f64 for float columns, i64 for all others. Bit i of `valid`: row i is not
// null.
struct Block {
  union alignas(64) {
    double f64[kBlockRows];
    int64_t i64[kBlockRows];
  };
  uint64_t valid;
};

struct Field {
  std::string name;
  FeatureDtype dtype;
};

class RowSchema {
 public:
  // Refuses empty and repeated names. A schema without fields is one status word.
  static Status create(std::vector<Field> fields, RowSchema* out);

  const std::vector<Field>& fields() const { return fields_; }
  uint32_t row_words() const { return row_words_; }

  // Clears `n` rows and writes their status bytes; call before store().
  void init(uint64_t* rows, size_t stride_words, size_t n, const uint8_t* status) const;
  // Writes n <= 64 values of a field. A null keeps zero bits; f32 rounds once; a string code keeps its low 32
  // bits.
  void store(size_t field, const Block& block, size_t n, uint64_t* rows, size_t stride_words) const;
  // Reads n <= 64 values of a field; the value of a null is zero.
  void load(size_t field, const uint64_t* rows, size_t stride_words, size_t n, Block* out) const;

 private:
  struct Slot {
    uint32_t word;
    uint32_t shift;
  };
  std::vector<Field> fields_;
  std::vector<Slot> slots_;
  uint32_t row_words_ = 1;
};

// The one cast to float32: null becomes NaN.
void store_f32(const Block& block, FeatureDtype dtype, size_t n, float* out, size_t stride);

}  // namespace penstock
