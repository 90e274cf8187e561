// A backend that is no trees as what a lane runs. Others hold it too: Python, and whoever supervises it.
#pragma once

#include <memory>
#include <utility>

#include "engine/model.h"

namespace penstock {

// A Backend has n_features(), rule() and run() as a Model's.
template <class Backend>
class ForeignModel : public Model {
 public:
  explicit ForeignModel(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}
  size_t n_features() const override { return backend_->n_features(); }
  size_t n_outputs() const override { return backend_->rule().n_outputs(); }
  Status run(const float* rows, size_t n, double* scores) override { return backend_->run(rows, n, scores); }
  bool may_lack_scores() const override { return true; }
  bool inline_ok() const override { return false; }  // it waits for others, or may never end

 protected:
  const std::shared_ptr<Backend> backend_;
};

}  // namespace penstock
