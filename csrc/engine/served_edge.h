// The edge cache of one served version: settings, what a thread keeps of one call, and the state beside it.
// The code that ties it to ServedModel is in served_edge.cc.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/siphash.h"
#include "cache/edge_cache.h"
#include "cache/hot_inputs.h"
#include "engine/single_flight.h"

namespace penstock {

enum class EdgeMode : uint8_t { kOff, kAuto, kOn };

struct EdgeConfig {
  EdgeMode mode = EdgeMode::kOff;
  uint64_t capacity = 65536;
  int64_t ttl_ns = 60'000'000'000;
  uint32_t precompute = 1024;  // hottest inputs kept and computed ahead
  uint8_t seed[16] = {};       // of the fingerprints
  // kAuto: a lane whose rows cost more uses the cache, until they cost less than half of it. A miss costs
  // about 0.25 us in all (fingerprint, probe, entry), so unrepeated traffic loses at most a twentieth.
  int64_t least_row_ns = 5000;
  uint32_t hot_sample = 8;  // one in so many repeated requests is offered to the table of hot inputs
};

// What one thread keeps of the call at hand.
struct EdgeScratch {
  bool used = false;             // the call was looked up, and its rows may enter the cache
  uint64_t puts = 0;             // ServedEdge::puts at that time
  uint64_t random = 1;           // for the sample of repeated requests
  std::vector<Key128> keys;      // [rows]
  std::vector<double> scores;    // [rows * outputs]
  std::vector<float> features;   // of one row
  std::vector<int64_t> times;    // [views], of one row
  std::vector<Key128> row_keys;  // likewise
  std::vector<uint64_t> row_versions;
};

struct EdgeStats {
  bool enabled = false;  // mode is not off, and the service can be cached
  bool active = false;   // the lane's rows cost enough
  EdgeCacheStats cache{};
  uint64_t coalesced = 0;    // requests that shared the run of an equal one
  uint64_t precomputed = 0;  // predictions made ahead
};

struct ServedEdge {
  ServedEdge(const EdgeConfig& of, std::unique_ptr<EdgeCache> made, const SipHash128& start,
             bool service_cacheable, uint32_t requests, uint32_t rows, size_t views)
      : config(of),
        cache(std::move(made)),
        service_start(start),
        vectors_start(start),
        service(service_cacheable),
        flights(requests),
        hot(of.precompute),
        active(of.mode == EdgeMode::kOn),
        keys(rows),
        fills(rows),
        valid_from(rows),
        valid_until(rows),
        row_keys(rows * views),
        row_versions(rows * views) {
    const uint64_t kinds[] = {0, 1};
    service_start.add(&kinds[0], sizeof kinds[0]);
    vectors_start.add(&kinds[1], sizeof kinds[1]);
    orphans.reserve(requests);
  }

  static constexpr uint64_t kNeverLooked = UINT64_MAX;  // for EdgeScratch::puts

  const EdgeConfig config;
  const std::unique_ptr<EdgeCache> cache;
  SipHash128 service_start, vectors_start;  // they have taken in name, version and kind of call
  const bool service;                       // calls of the feature service can be cached
  SingleFlight flights;                     // under the model's lock
  HotInputs hot;
  // Relaxed; set under the lock by the lane's runs, read by every call: a late view costs a probe or saves
  // it.
  std::atomic<bool> active;
  std::atomic<uint64_t> puts{0};  // relaxed, raised under the lock; read before a lookup and again under it
  // Under the model's lock. Of each resident row: what it needs to enter the cache once it has scores.
  std::vector<Key128> keys;
  std::vector<uint8_t> fills;  // 1: it shall enter
  std::vector<int64_t> valid_from, valid_until;
  std::vector<Key128> row_keys;
  std::vector<uint64_t> row_versions;
  std::vector<uint32_t> orphans;        // followers whose leader ended without a result
  double run_ns = 0.0, run_rows = 0.0;  // averages over recent runs
  uint64_t coalesced = 0, precomputed = 0;
  bool precomputing = false;  // a run of precompute() is on: no other may begin
};

}  // namespace penstock
