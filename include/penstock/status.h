// Result of an operation that can be refused: a canonical code and a message.
// An OK status holds no message and so allocates nothing. Codes and their order are the wire's
// (see wire/reply.h); they are never renumbered.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

namespace penstock {

enum class Code : uint8_t {
  kOk = 0,
  kInvalidArgument = 1,
  kNotFound = 2,
  kFailedPrecondition = 3,
  kResourceExhausted = 4,
  kDeadlineExceeded = 5,
  kCancelled = 6,
  kUnavailable = 7,
  kUnauthenticated = 8,
  kPermissionDenied = 9,
  kInternal = 10,
};

constexpr const char* code_name(Code code) {
  constexpr const char* kNames[] = {"OK",
                                    "INVALID_ARGUMENT",
                                    "NOT_FOUND",
                                    "FAILED_PRECONDITION",
                                    "RESOURCE_EXHAUSTED",
                                    "DEADLINE_EXCEEDED",
                                    "CANCELLED",
                                    "UNAVAILABLE",
                                    "UNAUTHENTICATED",
                                    "PERMISSION_DENIED",
                                    "INTERNAL"};
  return kNames[static_cast<uint8_t>(code)];
}

// A caller may send the same request again and hope for better.
constexpr bool is_retryable(Code code) {
  return code == Code::kResourceExhausted || code == Code::kUnavailable;
}

struct [[nodiscard]] Status {
  Code code = Code::kOk;
  std::string message;

  static Status ok() { return {}; }
  static Status invalid(std::string text) { return {Code::kInvalidArgument, std::move(text)}; }
  static Status not_found(std::string text) { return {Code::kNotFound, std::move(text)}; }
  bool is_ok() const { return code == Code::kOk; }
};

}  // namespace penstock
