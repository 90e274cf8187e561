#include "features/program.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "base/cpu.h"
#include "features/operations.h"

namespace penstock {

namespace {

constexpr uint32_t kUnused = 0xFFFFFFFFu;
constexpr uint32_t kMaxItems = 1u << 16;

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

ProgramKernel kernel() {
#if defined(__x86_64__)
  switch (cpu_level()) {
    case CpuLevel::kAvx512:
      return run_program_avx512;
    case CpuLevel::kAvx2:
      return run_program_avx2;
    case CpuLevel::kPortable:
      break;
  }
#endif
  return run_program_portable;
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
    TableData table;
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
    program->table_data_.push_back(std::move(table));
  }
  for (const TableData& table : program->table_data_) {
    program->tables_.push_back(
        {table.f64.data(), table.i64.data(), table.kind == 1 ? table.i64.size() : table.f64.size()});
  }
  for (uint32_t i = 0; i < n_code; ++i) {
    ProgramInstruction code{};
    code.op = in.get<uint16_t>();
    code.a = in.get<uint32_t>();
    code.b = in.get<uint32_t>();
    code.c = in.get<uint32_t>();
    bool good = !in.failed() && code.op < kFeatureOps;
    if (good) {
      const std::string signature = kSignatures[code.op];
      const uint32_t operands[3] = {code.a, code.b, code.c};
      for (size_t k = 0; good && k < 3; ++k) {
        const char kind = k + 1 < signature.size() ? signature[k + 1] : '-';
        if (kind == '-') {
          good = operands[k] == kUnused;
        } else if (kind == 'f' || kind == 'i') {
          good = operands[k] < kinds.size() && kinds[operands[k]] == kind;
          ++code.operands;
        } else {
          const uint8_t expected = kind == 's' ? 0 : kind == 't' ? 1 : 2;
          good = operands[k] < n_tables && program->table_data_[operands[k]].kind == expected;
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
    if (is_calendar(static_cast<FeatureOp>(code_[i].op))) {
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
    kernel()(&code_[i], 1, tables_.data(), 1, scratch.refs.data(), &scratch.registers[i]);
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
  for (size_t i = 0; i < code_.size(); ++i) scratch.refs[at++] = &scratch.registers[i];
  kernel()(code_.data(), code_.size(), tables_.data(), n, scratch.refs.data(), scratch.registers.data());
  const uint64_t rows = n == kBlockRows ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  for (size_t i = 0; i < outputs_.size(); ++i) {
    const Block& from = *scratch.refs[output_registers_[i]];
    Block& to = outputs[i];
    const uint64_t valid = from.valid & rows;
    to.valid = valid;
    for (size_t r = 0; r < n; ++r) to.i64[r] = from.i64[r] & -static_cast<int64_t>(valid >> r & 1);
  }
}

}  // namespace penstock
