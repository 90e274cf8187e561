// The row layout and the program loader under sanitizers: round trips, and every one-byte change of a
// program.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../check.h"
#include "features/program.h"

namespace {

using penstock::Block;
using penstock::FeatureDtype;
using penstock::FeatureProgram;

template <class T>
void put(std::vector<uint8_t>* out, T value) {
  const size_t at = out->size();
  out->resize(at + sizeof(T));
  std::memcpy(out->data() + at, &value, sizeof(T));
}

void put_field(std::vector<uint8_t>* out, char name, FeatureDtype dtype) {
  put<uint16_t>(out, 1);
  put(out, name);
  put(out, dtype);
}

// x = f + 2.0, from one float64 input.
std::vector<uint8_t> sample() {
  std::vector<uint8_t> out = {'P', 'S', 'F', 'P'};
  for (const uint32_t count : {1, 1, 1, 1, 0, 1}) put(&out, count);
  put_field(&out, 'f', FeatureDtype::kF64);
  put_field(&out, 'x', FeatureDtype::kF64);
  put<uint32_t>(&out, 2);
  put<uint8_t>(&out, 0);
  put<uint8_t>(&out, 1);
  put(&out, 2.0);
  put<uint16_t>(&out, 0);
  for (const uint32_t operand : {0u, 1u, 0xFFFFFFFFu}) put(&out, operand);
  return out;
}

void test_program() {
  const std::vector<uint8_t> bytes = sample();
  std::shared_ptr<const FeatureProgram> program;
  CHECK(FeatureProgram::parse(bytes.data(), bytes.size(), &program).is_ok());
  auto scratch = program->make_scratch();
  Block in{}, out{};
  in.f64[0] = 1.5;
  in.f64[1] = 9;
  in.valid = 1;
  program->run(&in, 2, &out, scratch);
  CHECK(out.valid == 1 && out.f64[0] == 3.5 && out.f64[1] == 0);
  float cast[2];
  penstock::store_f32(out, FeatureDtype::kF64, 2, cast, 1);
  CHECK(cast[0] == 3.5f && std::isnan(cast[1]));
  for (size_t size = 0; size < bytes.size(); ++size) {
    const std::vector<uint8_t> cut(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
    CHECK(!FeatureProgram::parse(cut.data(), size, &program).is_ok());
  }
  for (size_t at = 0; at < bytes.size(); ++at) {
    for (int flip = 1; flip < 256; ++flip) {
      std::vector<uint8_t> bad = bytes;
      bad[at] = static_cast<uint8_t>(bad[at] ^ flip);
      if (!FeatureProgram::parse(bad.data(), bad.size(), &program).is_ok()) continue;
      std::vector<Block> inputs(program->inputs().size()), outputs(program->outputs().size());
      auto own = program->make_scratch();
      program->run(inputs.data(), 64, outputs.data(), own);
    }
  }
}

void test_rows() {
  std::vector<penstock::Field> fields;
  for (int i = 0; i < 140; ++i) fields.push_back({"c" + std::to_string(i), FeatureDtype(i % 7)});
  penstock::RowSchema schema;
  CHECK(penstock::RowSchema::create(fields, &schema).is_ok());
  const size_t stride = schema.row_words();
  std::vector<uint64_t> rows(stride * 64);
  const std::vector<uint8_t> status(64, 3);
  schema.init(rows.data(), stride, 64, status.data());
  const auto cell = [&](size_t i, size_t r) { return static_cast<int64_t>(i % 7 == 3 ? r % 2 : i * r); };
  for (size_t i = 0; i < fields.size(); ++i) {
    Block block{};
    block.valid = 0x5555555555555555u << i % 2;
    for (size_t r = 0; r < 64; ++r) {
      if (penstock::is_float(fields[i].dtype)) {
        block.f64[r] = static_cast<double>(cell(i, r));
      } else {
        block.i64[r] = cell(i, r);
      }
    }
    schema.store(i, block, 64, rows.data(), stride);
  }
  for (size_t i = 0; i < fields.size(); ++i) {
    Block block{};
    schema.load(i, rows.data(), stride, 64, &block);
    CHECK(block.valid == 0x5555555555555555u << i % 2);
    for (size_t r = 0; r < 64; ++r) {
      const int64_t want = (block.valid >> r & 1) != 0 ? cell(i, r) : 0;
      const bool real = penstock::is_float(fields[i].dtype);
      CHECK(real ? block.f64[r] == static_cast<double>(want) : block.i64[r] == want);
      CHECK(rows[r * stride] == 3);
    }
  }
}

}  // namespace

int main() {
  test_program();
  test_rows();
  return 0;
}
