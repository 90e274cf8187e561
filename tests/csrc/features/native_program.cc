// Every operation of the program kernels under sanitizers: hostile values, any row count, and the same bits
// from each instruction set and from a row alone.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../check.h"
#include "base/cpu.h"
#include "features/operations.h"
#include "features/program.h"

namespace {

using penstock::Block;
using penstock::FeatureProgram;
using penstock::kFeatureOps;
using penstock::kSignatures;

template <class T>
void put(std::vector<uint8_t>* out, T value) {
  const size_t at = out->size();
  out->resize(at + sizeof(T));
  std::memcpy(out->data() + at, &value, sizeof(T));
}

// One instruction over three float64 and three int64 inputs; a table of each kind with `size` values.
std::vector<uint8_t> program_of(uint16_t op, uint32_t size) {
  const std::string signature = kSignatures[op];
  std::vector<uint8_t> out = {'P', 'S', 'F', 'P'};
  for (const uint32_t count : {1u, 6u, 1u, 0u, 3u, 1u}) put(&out, count);
  for (int i = 0; i < 6; ++i) {
    put<uint16_t>(&out, 1);
    put<char>(&out, static_cast<char>('a' + i));
    put<uint8_t>(&out, i < 3 ? 1 : 2);
  }
  put<uint16_t>(&out, 1);
  put<char>(&out, 'x');
  put<uint8_t>(&out, signature[0] == 'f' ? 1 : 2);
  put<uint32_t>(&out, 6);
  for (uint8_t kind = 0; kind < 3; ++kind) {
    const uint32_t count = kind == 2 && size == 0 ? 1 : size;
    put<uint8_t>(&out, kind);
    put<uint32_t>(&out, count);
    for (uint32_t k = 0; k < count; ++k) {
      if (kind == 1) {
        put<int64_t>(&out, int64_t{k} * 3 - 4);
      } else {
        put<double>(&out, k * 1.5 - 2);
      }
    }
    for (uint32_t k = 0; kind == 2 && k < count; ++k) put<int64_t>(&out, k + 1);
  }
  put<uint16_t>(&out, op);
  uint32_t floats = 0, ints = 3;
  for (size_t k = 1; k < 4; ++k) {
    uint32_t operand = 0xFFFFFFFFu;
    if (k < signature.size()) {
      const char kind = signature[k];
      operand = kind == 'f' ? floats++ : kind == 'i' ? ints++ : kind == 's' ? 0 : kind == 't' ? 1 : 2;
    }
    put<uint32_t>(&out, operand);
  }
  return out;
}

struct Random {
  uint64_t state = 88172645463325252u;
  uint64_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
  }
};

double hostile_float(Random& random) {
  const double edges[] = {0.0,
                          -0.0,
                          1.0,
                          -1.0,
                          0.5,
                          -2.5,
                          0x1p63,
                          -0x1p63,
                          5e-324,
                          1e300,
                          -1e300,
                          std::numeric_limits<double>::infinity(),
                          -std::numeric_limits<double>::infinity(),
                          std::numeric_limits<double>::quiet_NaN(),
                          709.8,
                          -745.2,
                          1e-9,
                          3.0};
  const uint64_t pick = random.next();
  if (pick % 3 == 0) return std::bit_cast<double>(random.next());
  return pick % 3 == 1 ? edges[pick / 3 % std::size(edges)] : static_cast<double>(pick >> 40) / 4096 - 2000;
}
int64_t hostile_int(Random& random) {
  const int64_t edges[] = {0, 1, -1, 2, -7, INT64_MIN, INT64_MIN + 1, INT64_MAX, 86400000000, -86400000001};
  const uint64_t pick = random.next();
  return pick % 2 == 0 ? edges[pick / 2 % std::size(edges)] : static_cast<int64_t>(random.next());
}

bool same(const Block& a, const Block& b, size_t row_a, size_t row_b, bool real) {
  if ((a.valid >> row_a & 1) != (b.valid >> row_b & 1)) return false;
  if (real && std::isnan(a.f64[row_a])) return std::isnan(b.f64[row_b]);
  return a.i64[row_a] == b.i64[row_b];
}

// The results of every operation, in a fixed order.
std::vector<Block> run_all(uint32_t table_size) {
  std::vector<Block> results;
  Random random;
  for (uint16_t op = 0; op < kFeatureOps; ++op) {
    const std::vector<uint8_t> bytes = program_of(op, table_size);
    std::shared_ptr<const FeatureProgram> program;
    CHECK(FeatureProgram::parse(bytes.data(), bytes.size(), &program).is_ok());
    auto scratch = program->make_scratch();
    const bool real = kSignatures[op][0] == 'f';
    for (const size_t n : {size_t{1}, size_t{7}, size_t{8}, size_t{63}, size_t{64}}) {
      std::vector<Block> in(6), alone(6);
      for (size_t i = 0; i < 6; ++i) {
        in[i].valid = random.next() | random.next();
        for (size_t r = 0; r < 64; ++r) {
          if (i < 3) {
            in[i].f64[r] = hostile_float(random);
          } else {
            in[i].i64[r] = hostile_int(random);
          }
        }
      }
      Block want{}, one{};
      program->run(in.data(), n, &want, scratch);
      CHECK((want.valid & ~(n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1)) == 0);
      for (size_t r = 0; r < n; ++r) {
        for (size_t i = 0; i < 6; ++i) {
          alone[i].i64[0] = in[i].i64[r];
          alone[i].valid = in[i].valid >> r & 1;
        }
        program->run(alone.data(), 1, &one, scratch);
        CHECK(same(want, one, r, 0, real));
        if ((want.valid >> r & 1) == 0) CHECK(want.i64[r] == 0);
        if (real && std::isnan(want.f64[r])) want.f64[r] = std::numeric_limits<double>::quiet_NaN();
      }
      results.push_back(want);
    }
  }
  return results;
}

}  // namespace

int main() {
  using penstock::CpuLevel;
  for (const uint32_t table_size : {0u, 5u}) {
    std::vector<Block> first;
    for (const CpuLevel level : {CpuLevel::kAvx512, CpuLevel::kAvx2, CpuLevel::kPortable}) {
      if (penstock::force_cpu_level(level) != level) continue;
      const std::vector<Block> found = run_all(table_size);
      if (first.empty()) first = found;
      CHECK(found.size() == first.size());
      for (size_t i = 0; i < found.size(); ++i) {
        CHECK(found[i].valid == first[i].valid);
        CHECK(std::memcmp(found[i].i64, first[i].i64, sizeof found[i].i64) == 0);
      }
    }
  }
  return 0;
}
