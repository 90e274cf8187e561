// A made-up service with an edge cache for the native test programs: rows (a, x) of a stored feature and a
// request input, and a model that adds them up, counts what it runs, may take its time, or fail.
#pragma once

#include <unistd.h>

#include <atomic>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "engine/serving_core.h"

namespace penstock::edge_service {

constexpr size_t kFeatures = 2;
constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

// The score is the sum of the row. Counts what it runs; may take its time, or fail.
class SumModel final : public Model {
 public:
  struct Shared {
    std::atomic<int> runs{0}, rows{0};
    std::atomic<int> sleep_us{0};
    std::atomic<bool> fail{false};
    std::atomic<bool> running{false};
  };
  explicit SumModel(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}
  size_t n_features() const override { return kFeatures; }
  size_t n_outputs() const override { return 1; }
  Status run(const float* rows, size_t n, double* scores) override {
    CHECK(!shared_->running.exchange(true));  // one run at a time
    for (size_t i = 0; i < n; ++i) scores[i] = static_cast<double>(rows[i * 2]) + rows[i * 2 + 1];
    if (shared_->sleep_us != 0) usleep(static_cast<useconds_t>(shared_->sleep_us.load()));
    ++shared_->runs;
    shared_->rows += static_cast<int>(n);
    shared_->running = false;
    if (shared_->fail) return {Code::kInternal, "a bad run"};
    return {};
  }

 private:
  std::shared_ptr<Shared> shared_;
};

// A program without an instruction: its outputs are users:a and the request input r:x, both f32.
inline std::shared_ptr<const FeatureProgram> identity_program() {
  std::string bytes = "PSFP";
  const auto u32 = [&](uint32_t v) { bytes.append(reinterpret_cast<const char*>(&v), 4); };
  const auto name = [&](const std::string& text) {
    const auto size = static_cast<uint16_t>(text.size());
    bytes.append(reinterpret_cast<const char*>(&size), 2);
    bytes += text;
    bytes += '\0';
  };
  for (const uint32_t v : {1u, 2u, 2u, 0u, 0u, 0u}) u32(v);
  for (const char* column : {"users:a", "r:x"}) name(column);
  uint32_t input = 0;
  for (const char* column : {"a", "x"}) {
    name(column);
    u32(input++);
  }
  std::shared_ptr<const FeatureProgram> program;
  CHECK(
      FeatureProgram::parse(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), &program).is_ok());
  return program;
}

const std::vector<Field> kFields{{"a", FeatureDtype::kF32}};

inline std::shared_ptr<const ServicePlan> make_plan(std::shared_ptr<FeatureCache> cache) {
  ServicePlanSpec spec;
  spec.entities = {{"user", FeatureDtype::kI64}};
  spec.views = {{"users", std::move(cache), kFields, {0}}};
  spec.request_source = "r";
  spec.inputs = {{"x", FeatureDtype::kF32}};
  spec.program = identity_program();
  std::shared_ptr<const ServicePlan> plan;
  CHECK(ServicePlan::create(std::move(spec), &plan).is_ok());
  return plan;
}

struct Asked {
  std::vector<int64_t> users;
  float x = 0;
  bool no_cache = false;
  double deadline_ms = 0;
};

inline std::string params_of(const Asked& asked) {
  wire::Writer out(1 << 16);
  out.array(4);
  out.str("m");
  out.map(1);
  out.str("user");
  const auto n = static_cast<uint32_t>(asked.users.size());
  if (n > 1) out.array(n);
  for (const int64_t user : asked.users) out.integer(user);
  out.map(1);
  out.str("x");
  if (n > 1) out.array(n);
  for (uint32_t r = 0; r < n; ++r) out.f32(asked.x);
  out.map(asked.deadline_ms > 0 ? 2 : 1);
  out.str("no_cache");
  out.boolean(asked.no_cache);
  if (asked.deadline_ms > 0) {
    out.str("deadline_ms");
    out.f64(asked.deadline_ms);
  }
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

inline std::string vector_params(float a, float x) {
  wire::Writer out(1 << 16);
  const float row[] = {a, x};
  out.array(3);
  out.str("m");
  out.bin(row, sizeof row);
  out.uint(1);
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

struct World {
  ServingCore core;
  std::shared_ptr<FeatureCache> users;
  std::shared_ptr<SumModel::Shared> shared = std::make_shared<SumModel::Shared>();
  std::shared_ptr<ServedModel> model;
  ServedModel::Scratch scratch;
  Result result;

  explicit World(EdgeMode mode = EdgeMode::kOn, int64_t latency_ns = 20'000'000'000,
                 uint64_t capacity = 3000) {
    RowSchema schema;
    CHECK(RowSchema::create(kFields, &schema).is_ok());
    std::unique_ptr<FeatureCache> made;
    CHECK(FeatureCache::create({3000, schema.row_words(), 0}, &made).is_ok());
    users = std::move(made);
    model = make_model("1", mode, latency_ns, capacity);
    core.publish(model);
  }
  ~World() { core.close(); }

  std::shared_ptr<ServedModel> make_model(const std::string& version, EdgeMode mode, int64_t latency_ns,
                                          uint64_t capacity) {
    ServedModelConfig config;
    config.name = "m";
    config.version = version;
    config.lane.max_requests = 2048;
    config.max_resident_rows = 4096;
    config.max_latency_ns = latency_ns;
    config.breaker.timeout_ns = 60'000'000'000;  // runs are held for long on a busy machine
    config.edge.mode = mode;
    config.edge.capacity = capacity;
    config.edge.ttl_ns = 0;
    config.edge.hot_sample = 1;
    auto made =
        std::make_shared<ServedModel>(config, std::make_unique<SumModel>(shared), make_plan(users), &core);
    CHECK(made->make_edge().is_ok());
    CHECK(made->warm_up().is_ok());
    made->start();
    shared->runs = 0;
    shared->rows = 0;
    return made;
  }

  void put_user(int64_t user, float a, uint64_t stamp, int64_t valid_until = kForever, uint8_t status = 0) {
    RowSchema schema;
    CHECK(RowSchema::create(kFields, &schema).is_ok());
    std::vector<uint64_t> row(schema.row_words());
    schema.init(row.data(), schema.row_words(), 1, &status);
    Block block{};
    block.f64[0] = a;
    block.valid = 1;
    schema.store(0, block, 1, row.data(), schema.row_words());
    const RowMeta meta{0, valid_until, static_cast<int64_t>(stamp), 0};
    CHECK(users->put(key_of_int(user), row.data(), meta, stamp, mono_ns(), 0) !=
          FeatureCache::PutResult::kSuperseded);
  }

  // The answer is in `result`.
  void call(bool vectors, const std::string& params) {
    ServingCore::LocalCall call;
    result.status = core.begin_local(vectors, params, scratch, &call);
    if (!result.status.is_ok()) return;
    if (!call.model->take(call.tag, &result)) {
      call.model->wait(call.tag, call.waiter);
      CHECK(call.model->take(call.tag, &result));
    }
  }
  double score(const Asked& asked) {
    call(false, params_of(asked));
    CHECK(result.status.is_ok());
    return result.scores[0];
  }
  EdgeStats edge(ServedModelStats* all = nullptr) {
    auto stats = std::make_unique<ServedModelStats>();
    model->stats(stats.get());
    for (const EndCounters& c : {stats->requests, stats->rows})
      CHECK(c.submitted == c.in_flight + c.ok + c.rejected + c.expired + c.cancelled + c.failed);
    if (all != nullptr) *all = *stats;
    return stats->edge;
  }
};

struct Served {
  std::vector<uint64_t> ids = std::vector<uint64_t>(5000);
  std::vector<int64_t> now = std::vector<int64_t>(5000), events = std::vector<int64_t>(5000);
  std::vector<uint8_t> status = std::vector<uint8_t>(5000);
  std::vector<double> scores = std::vector<double>(5000);
  std::vector<float> rows = std::vector<float>(5000 * kFeatures);
  size_t n;
  explicit Served(ServedModel& model) {
    n = model.served().drain(
        5000, {ids.data(), now.data(), status.data(), scores.data(), rows.data(), events.data()});
  }
};

}  // namespace penstock::edge_service
