#include "engine/route.h"

#include <algorithm>

#include "base/key.h"
#include "engine/served_model.h"

namespace penstock {
namespace {

// Sixteen bytes of the version's name, so that each trial draws keys of its own.
KeyHasher hasher_of(const Trial& trial) {
  uint8_t seed[16] = {};
  const std::string& version = trial.model->config().version;
  for (size_t i = 0; i < version.size(); ++i)
    seed[i % 16] = static_cast<uint8_t>(31 * seed[i % 16] + version[i]);
  return KeyHasher(seed);
}

bool within(uint64_t hash, uint32_t share) {
  return hash % Trial::kWhole < share;
}

// A value by what it means: the same integer in another encoding is the same key.
void add_value(KeyHasher& hasher, wire::Cursor value) {
  int64_t integer;
  std::string_view text;
  if (value.read_int(&integer)) {
    hasher.add_int(integer);
  } else if (value.read_str(&text)) {
    hasher.add_str(text);
  } else {
    hasher.add_bytes("");
  }
}

}  // namespace

bool same_inputs(const ServedModel& a, const ServedModel& b) {
  return a.n_features() == b.n_features() && a.n_views() == b.n_views();
}

Status may_try(const ServedModel& champion, const Trial& trial) {
  if (trial.model == nullptr) return {};
  const auto refused = [&](const std::string& what) {
    return Status{Code::kFailedPrecondition, "version '" + trial.model->config().version + "' of model '" +
                                                 champion.config().name + "' " + what};
  };
  if (trial.model.get() == &champion) return refused("is live; expected another one");
  if (trial.mode == TrialMode::kShadow && !same_inputs(champion, *trial.model)) {
    return refused("takes " + std::to_string(trial.model->n_features()) + " inputs of " +
                   std::to_string(trial.model->n_views()) +
                   " views; a shadow needs those of the live version, " +
                   std::to_string(champion.n_features()) + " of " + std::to_string(champion.n_views()));
  }
  return {};
}

bool takes_part(const Trial& trial, const wire::PredictCall& call) {
  if (trial.share == 0 || trial.share >= Trial::kWhole) return trial.share != 0;
  KeyHasher hasher = hasher_of(trial);
  uint64_t hash = 0;
  for (uint32_t c = 0; c < call.entities.size; ++c) {
    const wire::Column& column = call.entities.column[c];
    hasher.reset();
    hasher.add_str(column.name);
    if (column.count > 0) add_value(hasher, column.cursor());
    hash ^= hasher.finish().lo;  // in any order of columns
  }
  return within(hash, trial.share);
}

bool takes_part(const Trial& trial, const wire::VectorsCall& call) {
  if (trial.share == 0 || trial.share >= Trial::kWhole) return trial.share != 0;
  KeyHasher hasher = hasher_of(trial);
  hasher.reset();
  const size_t row = call.rows == 0 ? 0 : call.bytes / call.rows;
  hasher.add_bytes({reinterpret_cast<const char*>(call.data), row});
  return within(hasher.finish().lo, trial.share);
}

}  // namespace penstock
