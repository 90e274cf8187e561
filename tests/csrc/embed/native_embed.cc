// The public headers under threads: a bundle is loaded, served, predicted from several threads while versions
// are replaced, and no call fails, waits past its deadline unanswered, or (once warm) allocates. Every score
// is that of the version that gave it. Wrong sizes, options and names have their status.
#include <penstock/bundle.h>
#include <penstock/engine.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "base/sha256.h"
#include "check.h"
#include "count_allocations.h"
#include "embed/block_yaml.h"
#include "model/tree_format.h"

using namespace penstock;

namespace {
constexpr size_t kInputs = 3;

// One split: values[0] where input 1 is at most 0 or missing, else values[1].
std::string stump(const double (&values)[2]) {
  std::string body;
  const auto put = [&body](const auto& value) {
    body.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  put(0.0);
  for (const uint32_t v : {0u, 1u, 0u, 2u, 0u}) put(v);  // split_begin, leaf_begin, tree_output
  put(Split{1, ~0, ~1, 0.0f, kDefaultLeft, 0, 0});
  for (const double v : values) put(v);
  TreeHeader header{};
  std::memcpy(header.magic, kTreeMagic, sizeof kTreeMagic);
  header.version = kTreeVersion;
  header.n_features = kInputs;
  header.n_outputs = header.n_trees = header.n_splits = 1;
  header.n_leaves = header.n_leaf_values = 2;
  header.alpha = 1;
  uint32_t crc = ~0u;
  for (const char c : body) {
    crc ^= static_cast<uint8_t>(c);
    for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ (0xedb88320u & (0u - (crc & 1u)));
  }
  header.crc = ~crc;
  return std::string(reinterpret_cast<const char*>(&header), sizeof header) + body;
}

std::string sha256(const std::string& data) {
  Sha256 digest;
  digest.update(reinterpret_cast<const uint8_t*>(data.data()), data.size());
  return digest.hex_digest();
}

// A bundle of version `version`, whose scores are version and version + 0.5.
std::string write_bundle(const std::string& parent, int version) {
  const std::string folder = parent + "/" + std::to_string(version);
  std::filesystem::create_directories(folder);
  const std::string trees = stump({1.0 * version, version + 0.5});
  const auto entry = [](const std::string& name, const std::string& data) {
    return "  " + name + ":\n    sha256: " + sha256(data) + "\n    size: " + std::to_string(data.size()) +
           "\n";
  };
  std::ofstream(folder + "/trees.bin") << trees;
  std::ofstream(folder + "/reference.arrow") << "reference";
  std::ofstream(folder + "/model.yaml")
      << "schema_version: 1\nname: m\nversion: '" << version
      << "'\nformat: trees\nservice: s\nfingerprint: " << std::string(64, 'a')
      << "\ninputs:\n- name: a\n  dtype: float32\n"
         "- name: 'b: ''c'''\n  dtype: int64\n- name: \"d\\\n    \\ e\\xE9\"\n  dtype: bool\n"
         "output:\n  kind: value\n  classes: []\nfiles:\n"
      << entry("trees.bin", trees) << entry("reference.arrow", "reference")
      << "training:\n  anything: &a [1,\n    2]\n- x\nmetrics: {}\n"
      << "dictionaries:\n- source: data/e.parquet\n  column: 'c: d'\n  texts: 3\n";
  return folder;
}

void check_digests() {
  CHECK(sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  CHECK(sha256("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  CHECK(sha256(std::string(1'000'000, 'a')) ==
        "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
  // Cut anywhere, the same.
  const std::string text(200, 'x');
  for (size_t cut = 0; cut <= text.size(); ++cut) {
    Sha256 digest;
    digest.update(reinterpret_cast<const uint8_t*>(text.data()), cut);
    digest.update(reinterpret_cast<const uint8_t*>(text.data()) + cut, text.size() - cut);
    CHECK(digest.hex_digest() == sha256(text));
  }
}

// Whatever is cut off or changed in a manifest, the parser ends, within its bytes.
void check_mutations(const std::string& folder) {
  std::ifstream file(folder + "/model.yaml");
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  YamlNode node;
  CHECK(parse_block_yaml(text, {"training"}, &node).is_ok());
  for (size_t at = 0; at < text.size(); ++at) {
    (void)parse_block_yaml(std::string(text.data(), at), {"training"}, &node);
    for (const char c : {'\n', ' ', '\'', '"', '\\', '-', ':', '\xC3', '{'}) {
      std::string changed = text;
      changed[at] = c;
      (void)parse_block_yaml(changed, {}, &node);
    }
  }
  std::string deep = "a:";
  for (int i = 0; i < 100'000; ++i) deep += i == 0 ? " - " : "- ";
  CHECK(!parse_block_yaml(deep, {}, &node).is_ok());
  deep = "a:\n";
  for (int i = 0; i < 100'000; ++i) deep += "- ";
  CHECK(!parse_block_yaml(deep, {}, &node).is_ok());
}

void check_refusals(const Bundle& bundle) {
  std::vector<float> rows(kInputs);
  std::vector<double> out(1);
  CHECK(Bundle().predict(rows, 1, out).code == Code::kFailedPrecondition);
  CHECK(bundle.predict(rows, 2, out).code == Code::kInvalidArgument);
  CHECK(bundle.predict(rows, 1, {}).code == Code::kInvalidArgument);
  CHECK(bundle.predict({}, 0, {}).is_ok());
  std::unique_ptr<Engine> engine;
  CHECK(Engine::create(&engine).is_ok());
  CHECK(engine->predict("m", rows, 1, out).code == Code::kNotFound);
  CHECK(engine->serve(Bundle()).code == Code::kFailedPrecondition);
  CHECK(engine->serve(bundle, {.max_batch_rows = 65}).code == Code::kInvalidArgument);
  CHECK(engine->serve(bundle, {.max_latency_ms = std::nan("")}).code == Code::kInvalidArgument);
  CHECK(engine->serve(bundle, {.max_latency_ms = 60'000}).is_ok());
  CHECK(engine->predict("m", rows, 2, out).code == Code::kInvalidArgument);
  CHECK(engine->predict("m", rows, 1, {}).code == Code::kInvalidArgument);
  CHECK(engine->predict("m", {}, 0, {}).code == Code::kInvalidArgument);
  CHECK(engine->predict("m", rows, 1, out, {.deadline_ms = -1}).code == Code::kInvalidArgument);
  CHECK(engine->predict("m", rows, 1, out, {.deadline_ms = 1e300}).is_ok());
  int64_t retry = 0;
  const Status late = engine->predict("m", rows, 1, out, {.deadline_ms = 1e-6}, &retry);
  CHECK(late.is_ok() || late.code == Code::kDeadlineExceeded || late.code == Code::kResourceExhausted);
  CHECK(retry >= -1);
  ServeStats stats;
  CHECK(engine->stats("m", &stats).is_ok() && stats.version == "1" && stats.in_flight == 0);
  CHECK(stats.submitted == stats.ok + stats.rejected + stats.expired + stats.cancelled + stats.failed);
  CHECK(engine->retire("m").is_ok());
  CHECK(engine->retire("m").code == Code::kNotFound);
  CHECK(engine->predict("m", rows, 1, out).code == Code::kNotFound);
}

// One warm call after another, inline and on the executor, beside the bare model.
void check_allocations(const Bundle& bundle) {
  for (const double inline_limit_us : {60e6, 0.0}) {
    std::unique_ptr<Engine> engine;
    CHECK(Engine::create(&engine).is_ok());
    CHECK(engine->serve(bundle, {.max_latency_ms = 60'000, .inline_limit_us = inline_limit_us}).is_ok());
    std::vector<float> rows(kInputs * 100, 1.0f);
    std::vector<double> out(100);
    uint64_t before = 0;
    for (int i = 0; i < 600; ++i) {
      if (i == 300) before = allocations.load(std::memory_order_relaxed);
      CHECK(engine->predict("m", rows, 100, out).is_ok());
      CHECK(bundle.predict(rows, 100, out).is_ok());
    }
    CHECK(allocations.load(std::memory_order_relaxed) == before);
  }
}

void check_threads(const std::vector<Bundle>& versions) {
  std::unique_ptr<Engine> engine;
  CHECK(Engine::create(&engine).is_ok());
  const ServeOptions options{.max_latency_ms = 60'000};
  CHECK(engine->serve(versions[0], options).is_ok());
  constexpr int kThreads = 4, kCalls = 1500;
  std::atomic<int> running{kThreads};  // release at a caller's end, acquire by the loop below
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::vector<float> rows;
      std::vector<double> out;
      for (int call = 0; call < kCalls; ++call) {
        const size_t n = 1 + static_cast<size_t>(call * 7 + t) % 90;
        rows.assign(n * kInputs, 0.0f);
        out.assign(n, -1.0);
        const auto high = [&](size_t i) { return (i + static_cast<size_t>(call + t)) % 3 == 0; };
        const float missing = std::numeric_limits<float>::quiet_NaN();
        for (size_t i = 0; i < n; ++i) rows[i * kInputs + 1] = high(i) ? 2.0f : i % 2 == 0 ? -1.0f : missing;
        CHECK(engine->predict("m", rows, n, out, {.low_priority = t % 2 == 1}).is_ok());
        const double version = std::floor(out[0]);
        CHECK(version >= 1 && version <= static_cast<double>(versions.size()));
        for (size_t i = 0; i < n; ++i) CHECK(out[i] == version + (high(i) ? 0.5 : 0.0));
        if (call % 4 == 0) {
          CHECK(versions[1].predict(rows, n, out).is_ok());
          for (size_t i = 0; i < n; ++i) CHECK(out[i] == 2 + (high(i) ? 0.5 : 0.0));
        }
      }
      running.fetch_sub(1, std::memory_order_release);
    });
  }
  size_t swaps = 0;
  while (running.load(std::memory_order_acquire) > 0 || swaps < 3) {
    CHECK(engine->serve(versions[++swaps % versions.size()], options).is_ok());
    ServeStats stats;
    CHECK(engine->stats("m", &stats).is_ok());
    CHECK(stats.version == versions[swaps % versions.size()].version());
    CHECK(stats.rejected + stats.expired + stats.cancelled + stats.failed == 0);
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

int main() {
  char folder[] = "/tmp/penstock-embed-XXXXXX";
  CHECK(mkdtemp(folder) != nullptr);
  check_digests();
  std::vector<Bundle> versions(3);
  for (int v = 1; v <= 3; ++v)
    CHECK(Bundle::load(write_bundle(folder, v), &versions[static_cast<size_t>(v) - 1]).is_ok());
  const Bundle& first = versions[0];
  CHECK(first.name() == "m" && first.version() == "1" && first.n_outputs() == 1 &&
        first.n_inputs() == kInputs);
  CHECK(first.inputs()[1].name == "b: 'c'" && first.inputs()[2].name == "d e\xC3\xA9");
  CHECK(first.output_kind() == "value" && first.classes().empty() && first.service() == "s");
  Bundle kept = first;
  CHECK(Bundle::load(std::string(folder) + "/none", &kept).code == Code::kNotFound && kept.version() == "1");
  check_mutations(std::string(folder) + "/1");
  check_refusals(first);
  check_allocations(first);
  check_threads(versions);
  std::filesystem::remove_all(folder);
  std::puts("ok");
}
