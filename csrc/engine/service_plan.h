// From the entities and inputs of a predict call to float32 model rows: keys, cached rows of each view, the
// service's program, the one cast. Immutable after create: any thread may gather, each with its own Scratch.
//
// Program inputs are named "view:column" (stored), "source:input" (request) and "now"; outputs are the
// model's inputs in order. What the caches do not hold is reported as misses; the caller loads those rows and
// gathers again with them as an Overlay. gather() allocates only when a Scratch meets its largest call so
// far.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/key.h"
#include "base/siphash.h"
#include "base/status.h"
#include "cache/feature_cache.h"
#include "features/program.h"
#include "wire/rpc.h"

namespace penstock {

struct PlanColumn {
  std::string name;
  FeatureDtype dtype;
};

struct PlanView {
  std::string name;  // owner of the program's inputs "name:column"
  std::shared_ptr<FeatureCache> cache;
  std::vector<Field> fields;
  std::vector<uint32_t> key_columns;  // indexes into ServicePlanSpec::entities, in key order; none: one row
  std::string rows_of;                // the view whose rows the cache holds; "" stands for `name`

  const std::string& loaded_as() const { return rows_of.empty() ? name : rows_of; }
};

struct ServicePlanSpec {
  std::vector<PlanColumn> entities;  // kI64 or kString
  std::vector<PlanView> views;
  std::string request_source;
  std::vector<PlanColumn> inputs;  // no strings
  std::shared_ptr<const FeatureProgram> program;
  uint8_t key_seed[16] = {};
  bool error_on_missing = false;  // a row that is not PRESENT fails the call
};

struct FeatureMiss {
  uint32_t view;
  uint32_t row;
  Key128 key;
};

// Rows loaded for the misses of one call: at most one for each (view, row).
struct Overlay {
  std::vector<int64_t> index;  // [view * rows + row]: the entry, or -1
  std::vector<std::vector<uint64_t>> words;
  std::vector<RowMeta> meta;
};

// Model rows of one call, as gather() leaves them.
struct GatheredRows {
  std::vector<float> rows;          // [n * n_features]
  std::vector<uint8_t> status;      // [n]: the worst row status of the row's views
  std::vector<int64_t> event_time;  // [n * n_views]; INT64_MIN: no value
  // Of what the rows were made, when `with_sources` asks for it.
  bool with_sources = false;
  std::vector<int64_t> valid_from, valid_until;  // [n]: no time is in it when a row is in no cache
  std::vector<Key128> row_keys;                  // [n * n_views]
  std::vector<uint64_t> row_versions;            // [n * n_views]: slot versions; 0: the row has a null key
};

class ServicePlan {
 public:
  // Working memory of one thread; fits one plan at a time and adapts to the next.
  struct Scratch {
    std::vector<std::vector<uint64_t>> words;  // [view][kBlockRows * row_words]
    std::vector<Block> inputs, outputs;
    FeatureProgram::Scratch program;
    std::vector<int64_t> ints;           // [entity][kBlockRows]
    std::vector<std::string_view> text;  // [entity][kBlockRows]
    std::vector<uint64_t> nulls;         // [entity], bit per row
    std::vector<int64_t> now_buckets;
    uint64_t plan_id = 0;  // the plan that it fits; not its address, which a later plan may have
  };

  // Refuses what run time could not serve: unknown program inputs, wrong dtypes, string request inputs.
  static Status create(ServicePlanSpec spec, std::shared_ptr<const ServicePlan>* out);

  size_t n_features() const { return spec_.program->outputs().size(); }
  size_t n_views() const { return spec_.views.size(); }
  const PlanView& view(size_t index) const { return spec_.views[index]; }
  uint32_t row_words(size_t view) const { return schemas_[view].row_words(); }
  const RowSchema& row_schema(size_t view) const { return schemas_[view]; }

  // Fills `out` for every row of the call at request time now_us. With misses, only `misses` means anything.
  // use_cache false: every row that the overlay does not hold is a miss.
  Status gather(const wire::PredictCall& call, int64_t now_us, int64_t mono_ns, bool use_cache,
                const Overlay* overlay, Scratch& scratch, GatheredRows* out,
                std::vector<FeatureMiss>* misses) const;

  // Whether what a call says decides its rows, but for the feature rows: no use of the time of the request
  // that is not a calendar field of it.
  bool fingerprintable() const { return spec_.program->now_is_bucketed(); }
  // keys[r]: fingerprint of all that decides row r, but for the feature rows: keys and inputs as typed
  // values, and calendar fields of now_us. `start` has taken in what tells the model versions apart. Two
  // different rows are never the same bytes to the hash.
  Status fingerprint(const wire::PredictCall& call, int64_t now_us, const SipHash128& start, Scratch& scratch,
                     Key128* keys) const;

 private:
  enum class Source : uint8_t { kStored, kRequest, kNow };
  struct Input {
    Source source;
    uint32_t view;   // kStored
    uint32_t index;  // field of the view, or request input
  };

  explicit ServicePlan(ServicePlanSpec spec);
  Status resolve();
  void fit(Scratch& scratch) const;
  Status match(const wire::Columns& given, const char* group, const std::vector<PlanColumn>& wanted,
               const wire::Column** found) const;
  Status read_keys(wire::Cursor* cursors, const wire::Column* const* columns, uint32_t from, size_t n,
                   Scratch& scratch) const;
  Status read_input(size_t input, wire::Cursor& cursor, const wire::Column& column, uint32_t from, size_t n,
                    Block* block) const;
  void read_view(size_t view, uint32_t from, size_t n, uint32_t total, int64_t now_us, int64_t mono_ns,
                 bool use_cache, const Overlay* overlay, Scratch& scratch, GatheredRows* out,
                 std::vector<FeatureMiss>* misses) const;

  const uint64_t id_;  // distinct in the process
  ServicePlanSpec spec_;
  std::vector<RowSchema> schemas_;
  std::vector<Input> inputs_;  // of the program, in order
};

}  // namespace penstock
