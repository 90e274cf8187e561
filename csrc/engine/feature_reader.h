// Reads features of entity rows into float32 for a program in this process: what serving does before a model
// runs, and nothing else. Any thread may read, each with its own Work; nothing is allocated once a Work has
// met its largest call. The caches are filled by the caller, who loads what a read reports as misses.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "engine/service_plan.h"
#include "wire/rpc.h"

namespace penstock {

class FeatureReader {
 public:
  struct Work {
    wire::PredictCall call;  // points into the params of the last parse()
    ServicePlan::Scratch scratch;
    GatheredRows rows;
    std::vector<FeatureMiss> misses;
  };

  explicit FeatureReader(std::shared_ptr<const ServicePlan> plan) : plan_(std::move(plan)) {}

  const ServicePlan& plan() const { return *plan_; }

  // Takes the params of a predict call (one MessagePack array of model, entities, inputs); the model is not
  // looked at. The bytes must outlive the reads of `work`.
  Status parse(const uint8_t* params, size_t size, Work& work) const;

  // Writes the call's rows to out[rows * n_features], unless it leaves misses in `work`. Rows of `loaded`
  // stand for misses of the read before.
  Status read(int64_t now_us, int64_t mono_ns, const Overlay* loaded, Work& work, float* out) const;

 private:
  std::shared_ptr<const ServicePlan> plan_;
};

}  // namespace penstock
