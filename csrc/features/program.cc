#include "features/program.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

namespace penstock {

namespace {

constexpr uint32_t kUnused = 0xFFFFFFFFu;
constexpr uint32_t kMaxItems = 1u << 16;

// Numbers are part of the program's bytes (penstock.features.program.OPS).
enum Op : uint16_t {
  kAddF,
  kSubF,
  kMulF,
  kDivF,
  kNegF,
  kAbsF,
  kSqrtF,
  kFloorF,
  kCeilF,
  kMinF,
  kMaxF,
  kLtF,
  kLeF,
  kEqF,
  kAddI,
  kSubI,
  kMulI,
  kNegI,
  kAbsI,
  kMinI,
  kMaxI,
  kLtI,
  kLeI,
  kEqI,
  kAnd,
  kOr,
  kNot,
  kWhereF,
  kWhereI,
  kIsNullF,
  kIsNullI,
  kFillF,
  kFillI,
  kIntToF,
  kFToInt,
  kFToF32,
  kIntToBool,
  kFToBool,
  kMinute,
  kHour,
  kWeekday,
  kDay,
  kMonth,
  kIsinF,
  kIsinI,
  kRank,
  kOpCount,
};

// Result kind, then operand kinds: f float, i integer, s/t/r table of floats, of integers, of ranks.
constexpr const char* kSignatures[kOpCount] = {
    "fff", "fff", "fff", "fff",  "ff",   "ff", "ff", "ff",  "ff",  "fff", "fff", "iff",
    "iff", "iff", "iii", "iii",  "iii",  "ii", "ii", "iii", "iii", "iii", "iii", "iii",
    "iii", "iii", "ii",  "fiff", "iiii", "if", "ii", "fff", "iii", "fi",  "if",  "ff",
    "ii",  "if",  "ii",  "ii",   "ii",   "ii", "ii", "ifs", "iit", "ffr"};

class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : at_(data), left_(size) {}
  template <class T>
  T get() {
    T value{};
    if (left_ < sizeof(T)) {
      failed_ = true;
      left_ = 0;
      return value;
    }
    std::memcpy(&value, at_, sizeof(T));
    at_ += sizeof(T);
    left_ -= sizeof(T);
    return value;
  }
  std::string text() {
    const size_t length = get<uint16_t>();
    if (left_ < length) {
      failed_ = true;
      return {};
    }
    std::string value(reinterpret_cast<const char*>(at_), length);
    at_ += length;
    left_ -= length;
    return value;
  }
  bool failed() const { return failed_; }
  size_t left() const { return left_; }

 private:
  const uint8_t* at_;
  size_t left_;
  bool failed_ = false;
};

Status corrupt(const std::string& what) {
  return Status::invalid("feature program is corrupt: " + what);
}

constexpr int64_t kHourUs = 3600LL * 1000000, kDayUs = 24 * kHourUs;

int64_t floor_div(int64_t a, int64_t b) {
  return a / b - (a % b < 0);
}
int64_t wrap(uint64_t bits) {
  return static_cast<int64_t>(bits);
}
uint64_t raw(int64_t value) {
  return static_cast<uint64_t>(value);
}

// Gregorian month (1..12) and day (1..31) of a day counted from 1970-01-01; H. Hinnant, "chrono-Compatible
// Low-Level Date Algorithms", civil_from_days.
void civil(int64_t days, int64_t* month, int64_t* day) {
  const int64_t z = days + 719468;
  const int64_t doe = z - floor_div(z, 146097) * 146097;
  const int64_t yoe = (doe - doe / 1460 + doe / 36524 - doe / 146096) / 365;
  const int64_t doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
  const int64_t mp = (5 * doy + 2) / 153;
  *day = doy - (153 * mp + 2) / 5 + 1;
  *month = mp < 10 ? mp + 3 : mp - 9;
}

// NaN wins; -0.0 is below +0.0.
double min_f(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
  if (a == b) return std::signbit(a) ? a : b;
  return a < b ? a : b;
}
double max_f(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
  if (a == b) return std::signbit(a) ? b : a;
  return a > b ? a : b;
}

}  // namespace

Status FeatureProgram::parse(const uint8_t* data, size_t size, std::shared_ptr<const FeatureProgram>* out) {
  if (size < 4 || std::memcmp(data, "PSFP", 4) != 0) return corrupt("magic is not 'PSFP'");
  Reader in(data + 4, size - 4);
  const auto version = in.get<uint32_t>();
  if (!in.failed() && version != 1) return corrupt("version is " + std::to_string(version) + "; expected 1");
  const auto n_inputs = in.get<uint32_t>(), n_outputs = in.get<uint32_t>(), n_constants = in.get<uint32_t>();
  const auto n_tables = in.get<uint32_t>(), n_code = in.get<uint32_t>();
  if (in.failed()) return corrupt("it ends inside the header");
  for (const uint32_t count : {n_inputs, n_outputs, n_constants, n_tables, n_code}) {
    if (count > kMaxItems || count > in.left()) return corrupt("a count is " + std::to_string(count));
  }
  auto program = std::make_shared<FeatureProgram>();
  std::string kinds;  // of each register: 'f' or 'i'
  const auto field = [&](std::vector<Field>* into) {
    Field value{in.text(), FeatureDtype::kF32};
    const auto dtype = in.get<uint8_t>();
    if (dtype >= kFeatureDtypes) return false;
    value.dtype = static_cast<FeatureDtype>(dtype);
    into->push_back(std::move(value));
    return !in.failed();
  };
  for (uint32_t i = 0; i < n_inputs; ++i) {
    if (!field(&program->inputs_)) return corrupt("input " + std::to_string(i));
    kinds += is_float(program->inputs_.back().dtype) ? 'f' : 'i';
  }
  for (uint32_t i = 0; i < n_outputs; ++i) {
    if (!field(&program->outputs_)) return corrupt("output " + std::to_string(i));
    program->output_registers_.push_back(in.get<uint32_t>());
  }
  for (uint32_t i = 0; i < n_constants; ++i) {
    const auto kind = in.get<uint8_t>(), valid = in.get<uint8_t>();
    const auto bits = in.get<uint64_t>();
    if (in.failed() || kind > 1 || valid > 1) return corrupt("constant " + std::to_string(i));
    Block block;
    std::fill_n(block.i64, kBlockRows, static_cast<int64_t>(bits));
    if (kind == 0) std::fill_n(block.f64, kBlockRows, std::bit_cast<double>(bits));
    block.valid = valid != 0 ? ~uint64_t{0} : 0;
    program->constants_.push_back(block);
    kinds += kind == 0 ? 'f' : 'i';
  }
  for (uint32_t i = 0; i < n_tables; ++i) {
    Table table;
    table.kind = in.get<uint8_t>();
    const auto count = in.get<uint32_t>();
    const size_t need = size_t{count} * (table.kind == 2 ? 16 : 8);
    bool good = !in.failed() && table.kind <= 2 && need <= in.left() && (table.kind != 2 || count > 0);
    for (uint32_t k = 0; good && k < count; ++k) {
      if (table.kind == 1) {
        table.i64.push_back(in.get<int64_t>());
        good = k == 0 || table.i64[k - 1] < table.i64[k];
      } else {
        table.f64.push_back(in.get<double>());
        good = !std::isnan(table.f64[k]) && (k == 0 || table.f64[k - 1] < table.f64[k]);
      }
    }
    for (uint32_t k = 0; good && table.kind == 2 && k < count; ++k) {
      table.i64.push_back(in.get<int64_t>());
      good = table.i64[k] > (k == 0 ? 0 : table.i64[k - 1]);
    }
    if (!good) return corrupt("table " + std::to_string(i));
    program->tables_.push_back(std::move(table));
  }
  for (uint32_t i = 0; i < n_code; ++i) {
    Instruction code{};
    code.op = in.get<uint16_t>();
    code.a = in.get<uint32_t>();
    code.b = in.get<uint32_t>();
    code.c = in.get<uint32_t>();
    bool good = !in.failed() && code.op < kOpCount;
    if (good) {
      const std::string signature = kSignatures[code.op];
      const uint32_t operands[3] = {code.a, code.b, code.c};
      for (size_t k = 0; good && k < 3; ++k) {
        const char kind = k + 1 < signature.size() ? signature[k + 1] : '-';
        if (kind == '-') {
          good = operands[k] == kUnused;
        } else if (kind == 'f' || kind == 'i') {
          good = operands[k] < kinds.size() && kinds[operands[k]] == kind;
        } else {
          const uint8_t expected = kind == 's' ? 0 : kind == 't' ? 1 : 2;
          good = operands[k] < n_tables && program->tables_[operands[k]].kind == expected;
        }
      }
      kinds += signature[0];
    }
    if (!good) return corrupt("instruction " + std::to_string(i));
    program->code_.push_back(code);
  }
  for (uint32_t i = 0; i < n_outputs; ++i) {
    const uint32_t reg = program->output_registers_[i];
    const char kind = is_float(program->outputs_[i].dtype) ? 'f' : 'i';
    if (reg >= kinds.size() || kinds[reg] != kind) return corrupt("register of output " + std::to_string(i));
  }
  if (in.left() != 0) return corrupt(std::to_string(in.left()) + " bytes follow its end");
  program->find_now_uses();
  *out = std::move(program);
  return Status::ok();
}

void FeatureProgram::find_now_uses() {
  enum Kind : uint8_t { kOther, kConstant, kNow };
  std::vector<Kind> kinds;  // of each register
  for (uint32_t i = 0; i < inputs_.size(); ++i) {
    kinds.push_back(inputs_[i].name == "now" ? kNow : kOther);
    if (kinds.back() == kNow) now_input_ = i;
  }
  kinds.insert(kinds.end(), constants_.size(), kConstant);
  for (uint32_t i = 0; i < code_.size(); ++i) {
    const std::string_view signature = kSignatures[code_[i].op];
    const uint32_t operands[3] = {code_[i].a, code_[i].b, code_[i].c};
    bool now = false, other = false;
    for (size_t k = 1; k < signature.size(); ++k) {
      if (signature[k] != 'f' && signature[k] != 'i') continue;
      now = now || kinds[operands[k - 1]] == kNow;
      other = other || kinds[operands[k - 1]] == kOther;
    }
    kinds.push_back(kOther);
    if (!now) continue;
    if (other) {
      now_bucketed_ = false;
      return;
    }
    now_steps_.push_back(i);
    if (code_[i].op >= kMinute && code_[i].op <= kMonth) {
      now_buckets_.push_back(i);
    } else {
      kinds.back() = kNow;
    }
  }
  for (const uint32_t output : output_registers_) now_bucketed_ = now_bucketed_ && kinds[output] != kNow;
}

void FeatureProgram::now_buckets(int64_t now_us, Scratch& scratch, int64_t* buckets) const {
  if (now_buckets_.empty()) return;
  Block now;
  now.i64[0] = now_us;
  now.valid = 1;
  const size_t first = inputs_.size() + constants_.size();
  scratch.refs[now_input_] = &now;
  for (size_t i = 0; i < constants_.size(); ++i) scratch.refs[inputs_.size() + i] = &constants_[i];
  for (const uint32_t i : now_steps_) {
    step(code_[i], 1, scratch.refs, &scratch.registers[i]);
    scratch.refs[first + i] = &scratch.registers[i];
  }
  for (size_t b = 0; b < now_buckets_.size(); ++b) {
    const Block& field = scratch.registers[now_buckets_[b]];
    buckets[b] = (field.valid & 1) != 0 ? field.i64[0] : std::numeric_limits<int64_t>::min();
  }
}

FeatureProgram::Scratch FeatureProgram::make_scratch() const {
  Scratch scratch;
  scratch.registers.resize(code_.size());
  scratch.refs.resize(inputs_.size() + constants_.size() + code_.size());
  return scratch;
}

void FeatureProgram::run(const Block* inputs, size_t n, Block* outputs, Scratch& scratch) const {
  size_t at = 0;
  for (size_t i = 0; i < inputs_.size(); ++i) scratch.refs[at++] = inputs + i;
  for (const Block& constant : constants_) scratch.refs[at++] = &constant;
  for (size_t i = 0; i < code_.size(); ++i) {
    step(code_[i], n, scratch.refs, &scratch.registers[i]);
    scratch.refs[at++] = &scratch.registers[i];
  }
  const uint64_t rows = n == kBlockRows ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Block& from = *scratch.refs[output_registers_[i]];
    Block& to = outputs[i];
    to.valid = from.valid & rows;
    for (size_t r = 0; r < n; ++r) {
      const bool valid = (to.valid >> r & 1) != 0;
      if (is_float(outputs_[i].dtype)) {
        to.f64[r] = valid ? from.f64[r] : 0.0;
      } else {
        to.i64[r] = valid ? from.i64[r] : 0;
      }
    }
  }
}

void FeatureProgram::step(const Instruction& code, size_t n, const std::vector<const Block*>& refs,
                          Block* out) const {
  const std::string_view signature = kSignatures[code.op];
  const auto operand = [&](size_t k, uint32_t index) -> const Block& {
    return k < signature.size() && (signature[k] == 'f' || signature[k] == 'i') ? *refs[index] : *out;
  };
  // An absent operand stands for `out` and is never read.
  const Block &a = operand(1, code.a), &b = operand(2, code.b), &c = operand(3, code.c);
  const bool binary = &b != out;
  out->valid = binary ? a.valid & b.valid : a.valid;
  const auto floats = [&](auto&& value) {
    for (size_t r = 0; r < n; ++r) out->f64[r] = value(r);
  };
  const auto ints = [&](auto&& value) {
    for (size_t r = 0; r < n; ++r) out->i64[r] = value(r);
  };
  const auto bit = [](uint64_t word, size_t r) { return (word >> r & 1) != 0; };
  const auto truth = [n](const Block& block) {
    uint64_t bits = 0;
    for (size_t r = 0; r < n; ++r) bits |= uint64_t{block.i64[r] != 0} << r;
    return bits;
  };
  switch (code.op) {
    case kAddF:
      floats([&](size_t r) { return a.f64[r] + b.f64[r]; });
      break;
    case kSubF:
      floats([&](size_t r) { return a.f64[r] - b.f64[r]; });
      break;
    case kMulF:
      floats([&](size_t r) { return a.f64[r] * b.f64[r]; });
      break;
    case kDivF:
      floats([&](size_t r) { return a.f64[r] / b.f64[r]; });
      break;
    case kNegF:
      floats([&](size_t r) { return -a.f64[r]; });
      break;
    case kAbsF:
      floats([&](size_t r) { return std::fabs(a.f64[r]); });
      break;
    case kSqrtF:
      floats([&](size_t r) { return std::sqrt(a.f64[r]); });
      break;
    case kFloorF:
      floats([&](size_t r) { return std::floor(a.f64[r]); });
      break;
    case kCeilF:
      floats([&](size_t r) { return std::ceil(a.f64[r]); });
      break;
    case kMinF:
      floats([&](size_t r) { return min_f(a.f64[r], b.f64[r]); });
      break;
    case kMaxF:
      floats([&](size_t r) { return max_f(a.f64[r], b.f64[r]); });
      break;
    case kLtF:
      ints([&](size_t r) { return a.f64[r] < b.f64[r]; });
      break;
    case kLeF:
      ints([&](size_t r) { return a.f64[r] <= b.f64[r]; });
      break;
    case kEqF:
      ints([&](size_t r) { return a.f64[r] == b.f64[r]; });
      break;
    case kAddI:
      ints([&](size_t r) { return wrap(raw(a.i64[r]) + raw(b.i64[r])); });
      break;
    case kSubI:
      ints([&](size_t r) { return wrap(raw(a.i64[r]) - raw(b.i64[r])); });
      break;
    case kMulI:
      ints([&](size_t r) { return wrap(raw(a.i64[r]) * raw(b.i64[r])); });
      break;
    case kNegI:
      ints([&](size_t r) { return wrap(0 - raw(a.i64[r])); });
      break;
    case kAbsI:
      ints([&](size_t r) { return a.i64[r] < 0 ? wrap(0 - raw(a.i64[r])) : a.i64[r]; });
      break;
    case kMinI:
      ints([&](size_t r) { return std::min(a.i64[r], b.i64[r]); });
      break;
    case kMaxI:
      ints([&](size_t r) { return std::max(a.i64[r], b.i64[r]); });
      break;
    case kLtI:
      ints([&](size_t r) { return a.i64[r] < b.i64[r]; });
      break;
    case kLeI:
      ints([&](size_t r) { return a.i64[r] <= b.i64[r]; });
      break;
    case kEqI:
      ints([&](size_t r) { return a.i64[r] == b.i64[r]; });
      break;
    case kAnd:
    case kOr: {  // Kleene: a known false decides `and`, a known true decides `or`
      const uint64_t ta = truth(a), tb = truth(b);
      const uint64_t decided =
          code.op == kAnd ? (a.valid & ~ta) | (b.valid & ~tb) : (a.valid & ta) | (b.valid & tb);
      out->valid |= decided;
      ints([&](size_t r) { return code.op == kAnd ? !bit(decided, r) : bit(decided, r); });
      break;
    }
    case kNot:
      ints([&](size_t r) { return a.i64[r] == 0; });
      break;
    case kWhereF:
    case kWhereI: {
      const uint64_t chosen = truth(a);
      out->valid = a.valid & ((chosen & b.valid) | (~chosen & c.valid));
      if (code.op == kWhereF) {
        floats([&](size_t r) { return bit(chosen, r) ? b.f64[r] : c.f64[r]; });
      } else {
        ints([&](size_t r) { return bit(chosen, r) ? b.i64[r] : c.i64[r]; });
      }
      break;
    }
    case kIsNullF:
    case kIsNullI:
      ints([&](size_t r) { return !bit(a.valid, r); });
      out->valid = ~uint64_t{0};
      break;
    case kFillF:
      floats([&](size_t r) { return bit(a.valid, r) ? a.f64[r] : b.f64[r]; });
      out->valid = a.valid | b.valid;
      break;
    case kFillI:
      ints([&](size_t r) { return bit(a.valid, r) ? a.i64[r] : b.i64[r]; });
      out->valid = a.valid | b.valid;
      break;
    case kIntToF:
      floats([&](size_t r) { return static_cast<double>(a.i64[r]); });
      break;
    case kFToInt:  // toward zero; NaN and what int64 cannot hold are null
      for (size_t r = 0; r < n; ++r) {
        const bool fits = a.f64[r] >= -0x1p63 && a.f64[r] < 0x1p63;
        out->i64[r] = fits ? static_cast<int64_t>(a.f64[r]) : 0;
        if (!fits) out->valid &= ~(uint64_t{1} << r);
      }
      break;
    case kFToF32:
      floats([&](size_t r) { return static_cast<double>(static_cast<float>(a.f64[r])); });
      break;
    case kIntToBool:
      ints([&](size_t r) { return a.i64[r] != 0; });
      break;
    case kFToBool:
      ints([&](size_t r) { return a.f64[r] != 0.0; });
      break;
    case kMinute:
      ints([&](size_t r) {
        const int64_t hour = floor_div(a.i64[r], kHourUs);
        return wrap(raw(a.i64[r]) - raw(hour) * raw(kHourUs)) / 60000000;
      });
      break;
    case kHour:
      ints([&](size_t r) {
        const int64_t hour = floor_div(a.i64[r], kHourUs);
        return hour - floor_div(hour, 24) * 24;
      });
      break;
    case kWeekday:
      ints([&](size_t r) {  // Monday is 0; 1970-01-01 was a Thursday
        const int64_t day = floor_div(a.i64[r], kDayUs) + 3;
        return day - floor_div(day, 7) * 7;
      });
      break;
    case kDay:
    case kMonth:
      ints([&](size_t r) {
        int64_t month = 0, day = 0;
        civil(floor_div(a.i64[r], kDayUs), &month, &day);
        return code.op == kDay ? day : month;
      });
      break;
    case kIsinF: {
      const auto& set = tables_[code.b].f64;
      ints([&](size_t r) {
        return !std::isnan(a.f64[r]) && std::binary_search(set.begin(), set.end(), a.f64[r]);
      });
      break;
    }
    case kIsinI: {
      const auto& set = tables_[code.b].i64;
      ints([&](size_t r) { return std::binary_search(set.begin(), set.end(), a.i64[r]); });
      break;
    }
    case kRank: {
      const Table& table = tables_[code.b];
      const auto total = static_cast<double>(table.i64.back());
      floats([&](size_t r) {
        if (std::isnan(a.f64[r])) return a.f64[r];
        const auto found = std::lower_bound(table.f64.begin(), table.f64.end(), a.f64[r]);
        const auto k = static_cast<size_t>(found - table.f64.begin());
        const int64_t below = k == 0 ? 0 : table.i64[k - 1];
        const int64_t equal = found != table.f64.end() && *found == a.f64[r] ? table.i64[k] - below : 0;
        return (static_cast<double>(below) + 0.5 * static_cast<double>(equal)) / total;
      });
      break;
    }
    default:
      break;  // parse() admits no other operation
  }
}

}  // namespace penstock
