#include "features/aggregate_sets.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "base/siphash.h"

namespace penstock {

uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

uint64_t text_hash(const std::string& text) {
  const uint8_t seed[16] = {};
  SipHash128 hash(seed);
  hash.add(text.data(), text.size());
  uint64_t lo, hi;
  hash.finish(&lo, &hi);
  return lo;
}

int64_t ValueDomain::canonical(Word value) const {
  if (!real) return value.i;
  if (value.f == 0.0) return 0;
  if (std::isnan(value.f)) return std::bit_cast<int64_t>(std::numeric_limits<double>::quiet_NaN());
  // A negative double's other bits are flipped, so that integers sort as the doubles do.
  const auto bits = std::bit_cast<int64_t>(value.f);
  return bits < 0 ? bits ^ kTimeMax : bits;
}

Word ValueDomain::restore(int64_t canonical) const {
  Word out;
  out.i = real && canonical < 0 ? canonical ^ kTimeMax : canonical;
  return out;
}

bool ValueDomain::less(int64_t a, int64_t b) const {
  if (texts == nullptr) return a < b;
  return (*texts)[static_cast<size_t>(a)] < (*texts)[static_cast<size_t>(b)];
}

uint64_t ValueDomain::hash(int64_t canonical) const {
  return texts == nullptr ? mix64(static_cast<uint64_t>(canonical) + 0x9E3779B97F4A7C15u)
                          : (*text_hashes)[static_cast<size_t>(canonical)];
}

void hll_add(uint8_t* registers, uint64_t hash) {
  const uint64_t rest = hash << 12;
  const auto rank = static_cast<uint8_t>(rest == 0 ? 53 : std::countl_zero(rest) + 1);
  uint8_t& at = registers[hash >> 52];
  if (rank > at) at = rank;
}

int64_t hll_estimate(const uint8_t* registers) {
  std::array<int64_t, 54> held{};
  for (uint32_t i = 0; i < kRegisters; ++i) ++held[registers[i]];
  double sum = 0.0;
  for (int rank = 53; rank >= 0; --rank) sum += std::ldexp(static_cast<double>(held[rank]), -rank);
  constexpr double kM = kRegisters, kAlpha = 0.7213 / (1.0 + 1.079 / kM);
  const double estimate = kAlpha * kM * kM / sum;
  if (estimate <= 2.5 * kM && held[0] > 0) {
    return static_cast<int64_t>(std::floor(kM * std::log(kM / static_cast<double>(held[0])) + 0.5));
  }
  return static_cast<int64_t>(std::floor(estimate + 0.5));
}

void ValueCounter::clear() {
  ++round_;
  used_.clear();
}

void ValueCounter::grow() {
  std::vector<Slot> old = std::move(slots_);
  slots_.assign(std::max<size_t>(64, 2 * old.size()), {0, 0, 0});
  std::vector<uint32_t> used = std::move(used_);
  used_.clear();
  for (const uint32_t at : used) add(old[at].value, old[at].times);
}

void ValueCounter::add(int64_t canonical, int64_t times) {
  if (2 * used_.size() >= slots_.size()) grow();
  const size_t mask = slots_.size() - 1;
  size_t at = mix64(static_cast<uint64_t>(canonical)) & mask;
  for (; slots_[at].round == round_; at = (at + 1) & mask) {
    if (slots_[at].value != canonical) continue;
    slots_[at].times += times;
    return;
  }
  slots_[at] = {canonical, times, round_};
  used_.push_back(static_cast<uint32_t>(at));
}

void ValueCounter::hash_into(const ValueDomain& domain, uint8_t* registers) const {
  for (const uint32_t at : used_) hll_add(registers, domain.hash(slots_[at].value));
}

int64_t ValueCounter::distinct(const ValueDomain& domain, int64_t exact) const {
  if (static_cast<int64_t>(size()) <= exact) return static_cast<int64_t>(size());
  std::array<uint8_t, kRegisters> registers{};
  hash_into(domain, registers.data());
  return hll_estimate(registers.data());
}

bool ValueCounter::top(const ValueDomain& domain, int64_t rank, Word* out) {
  if (rank > static_cast<int64_t>(size())) return false;
  const auto before = [&](const ValueCount& a, const ValueCount& b) {
    return a.times != b.times ? a.times > b.times : domain.less(a.value, b.value);
  };
  ranked_.clear();
  for (const uint32_t at : used_) ranked_.push_back({slots_[at].value, slots_[at].times});
  const auto at = ranked_.begin() + static_cast<ptrdiff_t>(rank - 1);
  std::nth_element(ranked_.begin(), at, ranked_.end(), before);
  *out = domain.restore(at->value);
  return true;
}

std::vector<ValueCount> ValueCounter::counts() const {
  std::vector<ValueCount> out;
  for (const uint32_t at : used_) out.push_back({slots_[at].value, slots_[at].times});
  std::sort(out.begin(), out.end(),
            [](const ValueCount& a, const ValueCount& b) { return a.value < b.value; });
  return out;
}

}  // namespace penstock
