// What a lane runs: a model of any backend, behind one call.
//
// One run at a time, on the lane's threads: the executor, or (where inline_ok) the thread that pumps.
// interrupt() and retry_after_ms() may come from any thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/status.h"

namespace penstock {

class TreeEnsemble;

class Model {
 public:
  virtual ~Model() = default;
  virtual size_t n_features() const = 0;
  virtual size_t n_outputs() const = 0;
  // rows [n, n_features], n in 1..64; scores [n, n_outputs]. A status that is not OK fails the whole batch.
  virtual Status run(const float* rows, size_t n, double* scores) = 0;
  // A score that is NaN or infinite is no score: the request of its row fails, the others of the batch do
  // not.
  virtual bool may_lack_scores() const { return false; }
  // False where a run waits for what its thread may not wait for: another process, or the GIL.
  virtual bool inline_ok() const { return true; }
  // Makes a run in progress return soon, where the backend can; no run follows.
  virtual void interrupt() {}
  // When a run was UNAVAILABLE: how long until another may do better; -1 if nobody knows.
  virtual int64_t retry_after_ms() const { return -1; }
};

// A trees.bin image as a Model.
Status make_tree_model(const uint8_t* data, size_t size, std::unique_ptr<Model>* out);
std::unique_ptr<Model> make_tree_model(std::shared_ptr<const TreeEnsemble> trees);

}  // namespace penstock
