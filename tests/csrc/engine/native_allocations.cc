// After start-up the native path allocates nothing: every allocation of the program is counted while requests
// with features and with vectors go through connections (inline, on the executor, in bursts of several
// connections) and through local calls, without and with a shadow of all keys.
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "../check.h"
#include "../count_allocations.h"
#include "engine/serving_core.h"

using namespace penstock;

namespace {

constexpr size_t kFeatures = 2;
constexpr uint64_t kUsers = 100;

class SumModel final : public Model {
 public:
  size_t n_features() const override { return kFeatures; }
  size_t n_outputs() const override { return 1; }
  Status run(const float* rows, size_t n, double* scores) override {
    for (size_t i = 0; i < n; ++i) scores[i] = rows[kFeatures * i] + rows[kFeatures * i + 1];
    return {};
  }
};

// A program without an instruction: its outputs are its inputs (users:a, users:b as f32).
std::shared_ptr<const FeatureProgram> identity_program() {
  std::string bytes = "PSFP";
  const auto u32 = [&](uint32_t v) { bytes.append(reinterpret_cast<const char*>(&v), 4); };
  const auto name = [&](const std::string& text) {
    const auto size = static_cast<uint16_t>(text.size());
    bytes.append(reinterpret_cast<const char*>(&size), 2);
    bytes += text;
    bytes += '\0';
  };
  for (const uint32_t v : {1u, 2u, 2u, 0u, 0u, 0u}) u32(v);
  name("users:a");
  name("users:b");
  for (uint32_t input = 0; input < 2; ++input) {
    name(input == 0 ? "a" : "b");
    u32(input);
  }
  std::shared_ptr<const FeatureProgram> program;
  CHECK(
      FeatureProgram::parse(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size(), &program).is_ok());
  return program;
}

std::shared_ptr<ServedModel> make_served(ServingCore& core, int64_t inline_limit_ns, std::string version) {
  ServicePlanSpec spec;
  spec.entities = {{"user", FeatureDtype::kI64}};
  std::unique_ptr<FeatureCache> cache;
  const std::vector<Field> fields = {{"a", FeatureDtype::kF32}, {"b", FeatureDtype::kF32}};
  RowSchema schema;
  CHECK(RowSchema::create(fields, &schema).is_ok());
  CHECK(FeatureCache::create({4 * kUsers, schema.row_words(), 0}, &cache).is_ok());
  std::vector<uint64_t> row(schema.row_words());
  for (uint64_t user = 0; user < kUsers; ++user) {
    const RowMeta meta{INT64_MIN, INT64_MAX, 0, 0};
    (void)cache->put(key_of_int(static_cast<int64_t>(user)), row.data(), meta, 1, mono_ns(), 0);
  }
  spec.views = {{"users", std::shared_ptr<FeatureCache>(std::move(cache)), fields, {0}}};
  spec.program = identity_program();
  std::shared_ptr<const ServicePlan> plan;
  CHECK(ServicePlan::create(std::move(spec), &plan).is_ok());
  ServedModelConfig config;
  config.name = "m";
  config.version = std::move(version);
  config.inline_limit_ns = inline_limit_ns;
  config.max_latency_ns = 60'000'000'000;
  auto served = std::make_shared<ServedModel>(config, std::make_unique<SumModel>(), plan, &core);
  CHECK(served->warm_up().is_ok());
  served->start();
  return served;
}

std::string params(bool vectors, int64_t user) {
  wire::Writer out(1 << 12);
  out.array(vectors ? 3 : 2);
  out.str("m");
  if (vectors) {
    const float row[kFeatures] = {1, 2};
    out.bin(row, sizeof row);
    out.uint(1);
  } else {
    out.map(1);
    out.str("user");
    out.integer(user);
  }
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

std::string request(bool vectors, int64_t user) {
  wire::Writer out(1 << 12);
  out.array(4);
  out.uint(0);
  out.uint(static_cast<uint64_t>(user));
  out.str(vectors ? "predict_vectors" : "predict");
  const std::string body = params(vectors, user);
  out.raw(body.data(), body.size());
  return {reinterpret_cast<const char*>(out.data()), out.size()};
}

struct Wire {
  std::unique_ptr<Connection> connection;
  int near = -1, far = -1;
};

// Every connection sends one request; then until all are answered, the loop does what is due.
void turn(ServingCore& core, std::array<Wire, 4>& wires, const std::vector<std::string>& requests, size_t at,
          std::vector<Connection::Call>* others) {
  for (Wire& wire : wires) {
    const std::string& bytes = requests[at++ % requests.size()];
    const std::span<uint8_t> room = wire.connection->session().get_buffer(bytes.size());
    CHECK(room.size() >= bytes.size());
    std::copy(bytes.begin(), bytes.end(), room.begin());
    wire.connection->received(bytes.size(), others);
  }
  for (Wire& wire : wires) {
    char reply[512];
    for (;;) {
      pollfd due[] = {{wire.far, POLLIN, 0}, {core.event_fd(), POLLIN, 0}};
      CHECK(poll(due, 2, 10'000) > 0);
      if (due[1].revents != 0) CHECK(core.wake().empty());
      if (due[0].revents != 0) break;
    }
    CHECK(::recv(wire.far, reply, sizeof reply, 0) > 0);
    CHECK(wire.connection->session().in_flight() == 0);
  }
}

void local(ServingCore& core, const std::string& call, ServedModel::Scratch& scratch, Result& result) {
  ServingCore::LocalCall local;
  CHECK(core.begin_local(call.find("user") == std::string::npos, call, scratch, &local).is_ok());
  local.model->wait(local.tag, local.waiter);
  CHECK(local.model->take(local.tag, &result) && result.status.is_ok());
  core.shadow(*local.model, result);
}

void check(int64_t inline_limit_ns, bool shadowed) {
  ServingCore core;
  const auto served = make_served(core, inline_limit_ns, "1");
  const auto shadow = make_served(core, inline_limit_ns, "2");
  core.publish(served);
  if (shadowed) CHECK(core.put_on_trial("m", {shadow, TrialMode::kShadow, Trial::kWhole}).is_ok());
  std::array<Wire, 4> wires;
  for (Wire& wire : wires) {
    int ends[2];
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    wire.near = ends[0];
    wire.far = ends[1];
    wire.connection = core.connect({{size_t{1} << 16, 16}, 64, size_t{1} << 16});
    CHECK(wire.connection->attach(wire.near));
  }
  std::vector<std::string> requests, calls;
  for (int64_t user = 0; user < static_cast<int64_t>(kUsers); ++user) {
    requests.push_back(request(user % 3 == 0, user));
    calls.push_back(params(user % 3 == 0, user));
  }
  ServedModel::Scratch scratch;
  Result result;
  std::vector<Connection::Call> others;
  const auto some = [&](size_t turns) {
    for (size_t i = 0; i < turns; ++i) {
      turn(core, wires, requests, 4 * i, &others);
      local(core, calls[i % calls.size()], scratch, result);
    }
  };
  some(200);  // the first ones size what is reused
  const uint64_t before = allocations.load();
  CHECK(before > 0);  // they are counted
  some(2000);
  CHECK(allocations.load() == before);
  ServedModelStats stats;
  do {
    shadow->stats(&stats);
  } while (stats.requests.in_flight > 0);
  CHECK(stats.requests.ok == (shadowed ? 5u * 2200 : 0));  // four connections and a local call a turn
  served->stats(&stats);
  CHECK(stats.requests.ok == 2200 * 5);
  CHECK(inline_limit_ns > 0 ? stats.inline_runs > 0 : stats.executor_runs > 0);
  CHECK(others.empty());
  for (Wire& wire : wires) {
    wire.connection.reset();
    ::close(wire.near);
    ::close(wire.far);
  }
  core.close();
}

}  // namespace

int main() {
  check(1'000'000'000, false);
  check(1'000'000'000, true);
  check(0, false);
  check(0, true);
  return 0;
}
