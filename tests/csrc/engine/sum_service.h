// A made-up service for the native test programs: rows (u, 2u, 1) of users, read through a cache, and a model
// that adds them up.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "engine/serving_core.h"

namespace penstock::sum_service {

constexpr size_t kFeatures = 3;

// The score is the sum of the row; some runs are slow.
class SumModel final : public Model {
 public:
  size_t n_features() const override { return kFeatures; }
  size_t n_outputs() const override { return 1; }
  Status run(const float* rows, size_t n, double* scores) override {
    CHECK(n >= 1 && n <= kMaxBatchRows);
    CHECK(!running_.exchange(true));  // one run at a time
    for (size_t i = 0; i < n; ++i) {
      scores[i] = 0;
      for (size_t f = 0; f < kFeatures; ++f) scores[i] += rows[i * kFeatures + f];
    }
    if (++runs_ % 64 == 0) usleep(300);
    running_ = false;
    return {};
  }

 private:
  std::atomic<bool> running_{false};
  uint64_t runs_ = 0;
};

// A program without an instruction: its outputs are its inputs (users:a, users:b, users:c as f32).
inline std::shared_ptr<const FeatureProgram> identity_program() {
  std::string bytes = "PSFP";
  const auto u32 = [&](uint32_t v) { bytes.append(reinterpret_cast<const char*>(&v), 4); };
  const auto name = [&](const std::string& text) {
    const auto size = static_cast<uint16_t>(text.size());
    bytes.append(reinterpret_cast<const char*>(&size), 2);
    bytes += text;
  };
  for (const uint32_t v : {1u, 3u, 3u, 0u, 0u, 0u}) u32(v);
  for (const char* column : {"users:a", "users:b", "users:c"}) {
    name(column);
    bytes += '\0';
  }
  uint32_t input = 0;
  for (const char* column : {"a", "b", "c"}) {
    name(column);
    bytes += '\0';
    u32(input++);
  }
  std::shared_ptr<const FeatureProgram> program;
  const Status status =
      FeatureProgram::parse(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), &program);
  if (!status.is_ok()) std::fprintf(stderr, "%s\n", status.message.c_str());
  CHECK(status.is_ok());
  return program;
}

inline std::vector<Field> fields() {
  return {{"a", FeatureDtype::kF32}, {"b", FeatureDtype::kF32}, {"c", FeatureDtype::kF32}};
}

inline std::shared_ptr<const ServicePlan> make_plan(std::shared_ptr<FeatureCache> cache) {
  ServicePlanSpec spec;
  spec.entities = {{"user", FeatureDtype::kI64}};
  spec.views = {{"users", std::move(cache), fields(), {0}}};
  spec.program = identity_program();
  std::shared_ptr<const ServicePlan> plan;
  CHECK(ServicePlan::create(std::move(spec), &plan).is_ok());
  return plan;
}

// User u has the row (u, 2u, 1).
inline float score_of_user(int64_t user) {
  return static_cast<float>(3 * user + 1);
}

}  // namespace penstock::sum_service
