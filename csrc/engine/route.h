// Which version of a model answers a request: the champion, or, for a share of the sticky keys, a version on
// trial. A sticky key is what the request is about: the entities of its first row (predict), or that row
// itself (predict_vectors). One key always gets the same version while a trial lasts, whatever the order of
// its columns and whoever sends it; another trial draws other keys. Values; any thread.
#pragma once

#include <cstdint>
#include <memory>

#include "wire/rpc.h"

namespace penstock {

class ServedModel;

enum class TrialMode : uint8_t {
  kCanary,  // the version on trial answers its share
  kShadow,  // the champion answers all; the version on trial scores its share too, unseen
};

struct Trial {
  static constexpr uint32_t kWhole = 10'000;  // the unit of `share`

  std::shared_ptr<ServedModel> model;
  TrialMode mode = TrialMode::kCanary;
  uint32_t share = 0;  // 0 .. kWhole
};

// Both take rows of the same width, with event times of as many views. What the columns mean is the caller's
// to compare.
bool same_inputs(const ServedModel& a, const ServedModel& b);
// FAILED_PRECONDITION if the trial's model cannot be tried beside this live one.
Status may_try(const ServedModel& champion, const Trial& trial);

// The version on trial takes part in a call: its sticky key falls into the share.
bool takes_part(const Trial& trial, const wire::PredictCall& call);
bool takes_part(const Trial& trial, const wire::VectorsCall& call);

}  // namespace penstock
