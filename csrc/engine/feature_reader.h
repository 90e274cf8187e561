// Reads features of entity rows into float32 for a program in this process: what serving does before a model
// runs, and nothing else. Rows that no cache has are computed from the views' event tables, where the reader
// was given them, or else by the caller, who loads what a read reports as misses. Any thread may read, each
// with its own Work; a read without misses allocates nothing once a Work has met its largest call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "engine/service_plan.h"
#include "features/event_table.h"
#include "wire/rpc.h"

namespace penstock {

class FeatureReader {
 public:
  struct Work {
    wire::PredictCall call;  // points into the params of the last parse()
    ServicePlan::Scratch scratch;
    GatheredRows rows;
    std::vector<FeatureMiss> misses;
    Overlay computed;
    // Of the misses of one view.
    std::vector<uint32_t> asked;
    std::vector<uint64_t> keys, words;
    std::vector<int64_t> now, meta;
    std::vector<uint8_t> status;
    std::vector<std::vector<Word>> values;
    std::vector<std::unique_ptr<bool[]>> valid;
    size_t n_valid = 0;
  };

  // `tables`: the event table of each view of the plan, or none at all.
  FeatureReader(std::shared_ptr<const ServicePlan> plan,
                std::vector<std::shared_ptr<const EventTable>> tables);

  const ServicePlan& plan() const { return *plan_; }
  // Whether compute() may be called.
  bool has_tables() const { return !tables_.empty(); }

  // Takes the params of a predict call (one MessagePack array of model, entities, inputs); the model is not
  // looked at. The bytes must outlive the reads of `work`.
  Status parse(const uint8_t* params, size_t size, Work& work) const;

  // Writes the call's rows to out[rows * n_features], unless it leaves misses in `work`. Rows of `loaded`
  // stand for misses of the read before.
  Status read(int64_t now_us, int64_t mono_ns, const Overlay* loaded, Work& work, float* out) const;

  // Computes the rows that the read before has missed, puts them into their caches under a stamp taken
  // before that read, and adds them to `work.computed`, which `reset` empties first.
  void compute(int64_t now_us, int64_t mono_ns, uint64_t stamp, unsigned threads, bool reset,
               Work& work) const;

 private:
  void compute_view(size_t view, int64_t now_us, int64_t mono_ns, uint64_t stamp, unsigned threads,
                    Work& work) const;

  std::shared_ptr<const ServicePlan> plan_;
  std::vector<std::shared_ptr<const EventTable>> tables_;
};

}  // namespace penstock
