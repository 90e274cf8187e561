// What load.h's run() refuses, each fault by the name of its setting.
#include <string>

#include "load/load.h"

namespace penstock::load {
namespace {

Status in_range(const char* name, double value, double low, double high) {
  if (value >= low && value <= high) return Status::ok();
  const auto shown = [](double number) {
    std::string text = std::to_string(number);
    text.erase(text.find_last_not_of('0') + 1);
    if (text.back() == '.') text.pop_back();
    return text;
  };
  return Status::invalid(std::string(name) + " is " + shown(value) + "; expected " + shown(low) + " to " +
                         shown(high));
}

}  // namespace

Status check(const Options& o, const Requests& r) {
  const struct {
    const char* name;
    double value, low, high;
  } kRanges[] = {{"connections", static_cast<double>(o.connections), 1, 65536},
                 {"in_flight", static_cast<double>(o.depth), 1, Options::kMaxDepth},
                 {"rate", o.rate, 0, 1e8},
                 {"warmup_s", o.warmup_s, 0, 3600},
                 {"duration_s", o.duration_s, 0.001, 86400},
                 {"drain_s", o.drain_s, 0, 3600},
                 {"tick_us", o.tick_us, 0, 1e6},
                 {"goodput_ms", o.goodput_ms, 0, 1e6},
                 {"reconnect_s", o.reconnect_s, 0, 3600},
                 {"tolerance", r.tolerance, 0, 1e300}};
  for (const auto& range : kRanges) {
    if (Status status = in_range(range.name, range.value, range.low, range.high); !status.is_ok()) {
      return status;
    }
  }
  if (r.count() == 0 || r.count() > UINT32_MAX)
    return Status::invalid("requests are none; expected at least one");
  if (r.offsets[0] != 0 || r.offsets.back() != r.bytes.size()) {
    return Status::invalid("offsets do not cover the requests; expected 0 first and their length last");
  }
  for (size_t i = 0; i < r.count(); ++i) {
    const std::string name = "request " + std::to_string(i);
    if (r.offsets[i + 1] <= r.offsets[i] || r.offsets[i + 1] > r.bytes.size()) {
      return Status::invalid(name + " is empty; expected rising offsets");
    }
    const uint8_t* p = r.bytes.data() + r.offsets[i];
    const uint64_t size = r.offsets[i + 1] - r.offsets[i];
    if (o.protocol == Protocol::kMsgpackRpc && (size < 9 || p[0] != 0x94 || p[1] != 0 || p[2] != 0xce)) {
      return Status::invalid(name + " is no MessagePack-RPC request with a uint32 msgid");
    }
  }
  for (const uint32_t i : r.order) {
    if (i >= r.count()) {
      return Status::invalid("order holds " + std::to_string(i) + "; expected less than the " +
                             std::to_string(r.count()) + " requests");
    }
  }
  if (!r.expected.empty() &&
      (r.scores_per_request == 0 || r.expected.size() != r.count() * r.scores_per_request)) {
    return Status::invalid("expected has " + std::to_string(r.expected.size()) + " scores; it needs " +
                           std::to_string(r.count()) + " x " + std::to_string(r.scores_per_request));
  }
  if (!o.greeting.empty() && o.protocol != Protocol::kMsgpackRpc) {
    return Status::invalid("a greeting is set; expected only with MessagePack-RPC");
  }
  return Status::ok();
}

const char* outcome_name(size_t outcome) {
  if (outcome <= static_cast<size_t>(Code::kInternal)) return code_name(static_cast<Code>(outcome));
  constexpr const char* kNames[] = {"WRONG_ANSWER", "HTTP_ERROR", "OTHER_ERROR"};
  return kNames[outcome - static_cast<size_t>(Outcome::kWrong)];
}

}  // namespace penstock::load
