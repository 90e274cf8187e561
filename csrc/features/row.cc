#include "features/row.h"

#include <bit>
#include <limits>
#include <unordered_set>

namespace penstock {

namespace {
constexpr const char* kNames[kFeatureDtypes] = {"float32", "float64",   "int64",   "bool",
                                                "string",  "timestamp", "duration"};

constexpr bool is_narrow(FeatureDtype dtype) {
  return dtype == FeatureDtype::kF32 || dtype == FeatureDtype::kString;
}
}  // namespace

const char* dtype_name(FeatureDtype dtype) {
  return kNames[static_cast<uint8_t>(dtype)];
}

Status dtype_from_name(const std::string& name, FeatureDtype* out) {
  for (uint8_t i = 0; i < kFeatureDtypes; ++i) {
    if (name == kNames[i]) {
      *out = static_cast<FeatureDtype>(i);
      return Status::ok();
    }
  }
  return Status::invalid("dtype is '" + name +
                         "'; expected float32, float64, int64, bool, string, timestamp or duration");
}

Status RowSchema::create(std::vector<Field> fields, RowSchema* out) {
  std::unordered_set<std::string> seen;
  for (const Field& field : fields) {
    if (field.name.empty()) return Status::invalid("a field's name is empty");
    if (!seen.insert(field.name).second) return Status::invalid("field '" + field.name + "' is given twice");
  }
  RowSchema schema;
  const auto words_of_bits = [](size_t bits) { return static_cast<uint32_t>((bits + 63) / 64); };
  uint32_t word = 1 + words_of_bits(fields.size());
  schema.slots_.resize(fields.size());
  uint32_t bit = 0;
  for (size_t i = 0; i < fields.size(); ++i) {
    if (fields[i].dtype != FeatureDtype::kBool) continue;
    schema.slots_[i] = {word + bit / 64, bit % 64};
    ++bit;
  }
  word += words_of_bits(bit);
  for (size_t i = 0; i < fields.size(); ++i) {
    const FeatureDtype dtype = fields[i].dtype;
    if (dtype != FeatureDtype::kBool && !is_narrow(dtype)) schema.slots_[i] = {word++, 0};
  }
  uint32_t halves = 0;
  for (size_t i = 0; i < fields.size(); ++i) {
    if (!is_narrow(fields[i].dtype)) continue;
    schema.slots_[i] = {word + halves / 2, halves % 2 * 32};
    ++halves;
  }
  schema.row_words_ = word + (halves + 1) / 2;
  schema.fields_ = std::move(fields);
  *out = std::move(schema);
  return Status::ok();
}

void RowSchema::init(uint64_t* rows, size_t stride_words, size_t n, const uint8_t* status) const {
  for (size_t r = 0; r < n; ++r) {
    uint64_t* row = rows + r * stride_words;
    row[0] = status[r];
    for (uint32_t w = 1; w < row_words_; ++w) row[w] = 0;
  }
}

void RowSchema::store(size_t field, const Block& block, size_t n, uint64_t* rows, size_t stride_words) const {
  const Slot slot = slots_[field];
  const FeatureDtype dtype = fields_[field].dtype;
  for (size_t r = 0; r < n; ++r) {
    uint64_t* row = rows + r * stride_words;
    const bool valid = (block.valid >> r & 1) != 0;
    uint64_t bits = 0;
    uint64_t mask = ~uint64_t{0};
    if (dtype == FeatureDtype::kBool) {
      bits = block.i64[r] != 0;
      mask = 1;
    } else if (dtype == FeatureDtype::kF32) {
      bits = std::bit_cast<uint32_t>(static_cast<float>(block.f64[r]));
      mask = 0xFFFFFFFFu;
    } else if (dtype == FeatureDtype::kString) {
      bits = static_cast<uint32_t>(block.i64[r]);
      mask = 0xFFFFFFFFu;
    } else if (dtype == FeatureDtype::kF64) {
      bits = std::bit_cast<uint64_t>(block.f64[r]);
    } else {
      bits = static_cast<uint64_t>(block.i64[r]);
    }
    if (!valid) bits = 0;
    row[slot.word] = (row[slot.word] & ~(mask << slot.shift)) | (bits << slot.shift);
    uint64_t& validity = row[1 + field / 64];
    validity = (validity & ~(uint64_t{1} << field % 64)) | (uint64_t{valid} << field % 64);
  }
}

void RowSchema::load(size_t field, const uint64_t* rows, size_t stride_words, size_t n, Block* out) const {
  const Slot slot = slots_[field];
  const FeatureDtype dtype = fields_[field].dtype;
  uint64_t valid = 0;
  for (size_t r = 0; r < n; ++r) {
    const uint64_t* row = rows + r * stride_words;
    valid |= (row[1 + field / 64] >> field % 64 & 1) << r;
    const uint64_t bits = row[slot.word] >> slot.shift;
    if (dtype == FeatureDtype::kF32) {
      out->f64[r] = std::bit_cast<float>(static_cast<uint32_t>(bits));
    } else if (dtype == FeatureDtype::kF64) {
      out->f64[r] = std::bit_cast<double>(bits);
    } else if (dtype == FeatureDtype::kString) {
      out->i64[r] = static_cast<int32_t>(static_cast<uint32_t>(bits));
    } else if (dtype == FeatureDtype::kBool) {
      out->i64[r] = static_cast<int64_t>(bits & 1);
    } else {
      out->i64[r] = static_cast<int64_t>(bits);
    }
  }
  out->valid = valid;
}

void store_f32(const Block& block, FeatureDtype dtype, size_t n, float* out, size_t stride) {
  for (size_t r = 0; r < n; ++r) {
    const float value = is_float(dtype) ? static_cast<float>(block.f64[r]) : static_cast<float>(block.i64[r]);
    out[r * stride] = (block.valid >> r & 1) != 0 ? value : std::numeric_limits<float>::quiet_NaN();
  }
}

}  // namespace penstock
