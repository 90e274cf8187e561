// A load generator: one thread, epoll, over TCP or a Unix socket. It sends requests that were encoded before,
// and compares every reply with what was expected, so that neither is what limits a server under test.
//
// Closed loop: every connection keeps `depth` requests in flight. Open loop: requests fall due at a constant
// rate or as a seeded Poisson process, whatever the server does; a latency counts from the moment at which
// the request was due, and one that could not be sent then (all connections full) is sent late, never
// dropped. A request belongs to the timed window when it was due (closed loop: sent) inside it. run() returns
// at the latest when warm-up, window and drain time are over. It may be called from any thread.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "load/hdr_histogram.h"

namespace penstock::load {

enum class Protocol : uint8_t {
  kMsgpackRpc,  // a reply is matched by its msgid
  kHttp,        // HTTP/1.1, replies in order
  kFixed,       // replies in order: the request's own bytes, or Options::fixed_reply for each request
};

// Where the scores stand in an HTTP body.
enum class BodyFormat : uint8_t {
  kNone,         // not looked at
  kFloat32,      // the body is little-endian float32
  kFloat64,      // the body is little-endian float64
  kFloat32Tail,  // the body ends in little-endian float32
  kJson,         // JSON numbers, the first ones after "json_key" where that is set
  kMsgpack,      // MessagePack: numbers, or a bin of float32, inside arrays and maps of any shape
};

// What a reply said. The first eleven are the wire's codes.
enum class Outcome : uint8_t { kOk = 0, kWrong = 11, kHttpError = 12, kOtherError = 13 };
inline constexpr size_t kOutcomes = 14;
const char* outcome_name(size_t outcome);

struct Requests {
  std::span<const uint8_t> bytes;     // the requests, one behind the other
  std::span<const uint64_t> offsets;  // request i is bytes [offsets[i], offsets[i + 1])
  std::span<const uint32_t>
      order;  // requests in the order of sending, again from the front; empty: 0, 1, ...
  std::span<const double> expected;  // scores_per_request for each request; empty: not verified
  uint32_t scores_per_request = 1;
  double tolerance = 1e-5;

  size_t count() const { return offsets.empty() ? 0 : offsets.size() - 1; }
};

struct Options {
  static constexpr uint32_t kMaxDepth = 65535;

  std::string address;  // tcp://HOST:PORT or unix://PATH
  Protocol protocol = Protocol::kMsgpackRpc;
  BodyFormat body = BodyFormat::kNone;
  std::string json_key;
  std::string fixed_reply;
  std::string greeting;  // a MessagePack-RPC request with msgid 2^32 - 1, sent first on each connection
  uint32_t connections = 1;
  uint32_t depth = 1;  // open loop: the most in flight on a connection
  double rate = 0;     // requests per second; 0: closed loop
  bool poisson = false;
  bool shed = false;  // open loop: a request that falls due while every connection is full is not sent at all
  uint64_t seed = 0;
  double warmup_s = 1;
  double duration_s = 5;
  double drain_s = 2;        // how long the answers to the last requests are awaited
  double tick_us = 50;       // open loop: requests that fall due within a tick are sent together
  double goodput_ms = 50;    // an answer within it is good
  double reconnect_s = 0.1;  // pause before a broken connection is made again
  bool series = false;       // fill Report::series
};

enum class Phase : uint8_t { kConnect, kWarmup, kWindow, kDrain, kDone };

struct Progress {
  Phase phase;
  double seconds;  // since the first request
  uint64_t ok;     // answers so far
  uint64_t failed;
};

struct Second {
  uint64_t answers_ok = 0;  // that arrived in this second of the window
  uint64_t answers_not_ok = 0;
  uint64_t max_ns = 0;  // the largest latency among the ok ones
};

struct Report {
  struct ByOutcome {
    HdrHistogram latency;    // from the due time
    HdrHistogram from_send;  // from the write, where that differs (open loop)
  };
  std::vector<ByOutcome> outcomes = std::vector<ByOutcome>(kOutcomes);  // of the window's requests
  std::map<int, uint64_t> http_statuses;                                // not 2xx
  std::map<std::string, uint64_t> other_errors;  // codes that are not the wire's; at most 16
  double window_s = 0;                           // the part of the window that passed
  uint64_t due = 0;                              // requests of the window
  uint64_t sent = 0;
  uint64_t unsent = 0;            // due in the window and never sent
  uint64_t unanswered = 0;        // sent, and no answer came in time
  uint64_t transport_errors = 0;  // sent on a connection that broke
  uint64_t shed = 0;              // due while every connection was full, and given up (Options::shed)
  uint64_t held_back = 0;         // sent late since every connection was full
  uint64_t answers_in_window =
      0;              // ok answers that arrived inside the window, whenever their requests were due
  uint64_t good = 0;  // ok answers of the window's requests within goodput_ms
  uint64_t broken_connections = 0;
  uint64_t reconnects = 0;
  uint64_t unexpected = 0;  // replies that belong to no request in flight
  uint64_t bytes_sent = 0, bytes_received = 0;
  double max_error =
      0;  // the largest difference from an expected score, of the replies that were in tolerance
  double thread_cpu_s = 0;  // of the generator, in the window
  bool stopped = false;     // the watcher asked for it
  std::vector<Second> series;
};

// Called a few times a second and at each change of phase; false ends the run.
using Watch = std::function<bool(const Progress&)>;

Status run(const Options& options, const Requests& requests, const Watch& watch, Report* report);

}  // namespace penstock::load
