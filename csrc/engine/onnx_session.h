// An ONNX model on onnxruntime's CPU provider, called through its C API: no thread of a run needs the GIL.
//
// A run copies its rows into one buffer; a tensor for each batch size lies over that and over the buffer of
// the scores, made once: a run of this class allocates nothing (what the library does inside is its own).
// Threads: any. One run at a time; interrupt() may come beside it.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "batch/policy.h"
#include "engine/foreign_model.h"
#include "engine/onnx_api.h"
#include "engine/score_rule.h"

namespace penstock {

struct OnnxRuntime;

class OnnxSession {
 public:
  struct Spec {
    std::string library;  // path of libonnxruntime.so
    std::string input;    // float32 [n, n_features]
    std::string output;   // [n] or [n, width]
    size_t n_features = 0;
    bool flat = false;  // the output is [n]
    bool wide = false;  // the output is float64, else float32
    int threads = 1;    // of one run
    ScoreRule rule;
  };

  // FAILED_PRECONDITION: the library cannot be used. INVALID_ARGUMENT: it refuses the model, or the model
  // has other inputs or lacks the output.
  static Status open(const void* model, size_t bytes, const Spec& spec, std::shared_ptr<OnnxSession>* out);
  ~OnnxSession();
  OnnxSession(const OnnxSession&) = delete;
  OnnxSession& operator=(const OnnxSession&) = delete;

  size_t n_features() const { return spec_.n_features; }
  const ScoreRule& rule() const { return spec_.rule; }
  // rows [n, n_features], n in 1..64; scores [n, rule().n_outputs()].
  Status run(const float* rows, size_t n, double* scores);
  // Ends a run in progress at its next operator; no run succeeds after.
  void interrupt();

 private:
  OnnxSession(const OnnxRuntime& runtime, const Spec& spec);
  Status make(const void* model, size_t bytes);
  Status make_session(const void* model, size_t bytes);
  Status check_names() const;
  Status make_tensors();

  const OnnxRuntime& runtime_;
  const OnnxApi& api_;
  const Spec spec_;
  std::vector<float> rows_;              // [64, n_features]
  std::unique_ptr<std::byte[]> scores_;  // float32 or float64 [64, width]
  OrtSession* session_ = nullptr;
  OrtRunOptions* options_ = nullptr;
  std::array<OrtValue*, kMaxBatchRows> inputs_{};  // of n + 1 rows
  std::array<OrtValue*, kMaxBatchRows> outputs_{};
};

// A session as what a lane runs.
class OnnxModel final : public ForeignModel<OnnxSession> {
 public:
  using ForeignModel::ForeignModel;
  void interrupt() override { backend_->interrupt(); }
};

}  // namespace penstock
