// A model bundle: a folder that penstock.models.save_bundle() wrote, with tree ensembles (format "trees").
// load() verifies what the Python loader does, but for the reference distribution, of which it checks the
// checksum alone, and the sections `training` and `metrics` of model.yaml, which it passes over.
//
// A bundle never changes: copies share it, and any thread may call any const member. Nothing here throws or
// prints. A bundle of a feature service takes the service's features, in the order of inputs().
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "penstock/status.h"

namespace penstock {

class Bundle {
 public:
  struct Input {
    std::string name;
    std::string dtype;  // of the training column: float32, float64, int64 or bool; rows are float32
  };

  Bundle() noexcept;  // empty: without a name, inputs and outputs
  Bundle(const Bundle&) noexcept;
  Bundle(Bundle&&) noexcept;
  Bundle& operator=(const Bundle&) noexcept;
  Bundle& operator=(Bundle&&) noexcept;
  ~Bundle();

  // Reads the bundle in `folder`. On an error, which names the file and its fault, *out stays as it was.
  // NOT_FOUND: there is no such folder. INVALID_ARGUMENT: it holds no valid bundle. FAILED_PRECONDITION: the
  // bundle is of a format that this library does not serve. RESOURCE_EXHAUSTED: no memory.
  static Status load(const std::string& folder, Bundle* out) noexcept;

  explicit operator bool() const noexcept { return impl_ != nullptr; }
  const std::string& name() const noexcept;
  const std::string& version() const noexcept;
  const std::vector<Input>& inputs() const noexcept;  // in the order of a row's values
  size_t n_inputs() const noexcept { return inputs().size(); }
  size_t n_outputs() const noexcept;                // scores of a row
  const std::string& output_kind() const noexcept;  // "probability", "margin" or "value"
  // Labels as text: of the outputs, or of 0 and 1 for one probability; may be empty.
  const std::vector<std::string>& classes() const noexcept;
  const std::string& service() const noexcept;  // the feature service; empty: none

  // Scores of n rows on this thread, beside any engine. rows: [n, n_inputs()], NaN is a missing value; out:
  // [n, n_outputs()]. INVALID_ARGUMENT: a span has another size. As many threads as ever were here at once
  // have buffers; another call allocates nothing.
  Status predict(std::span<const float> rows, size_t n, std::span<double> out) const noexcept;

 private:
  friend class Engine;
  struct Impl;
  std::shared_ptr<const Impl> impl_;
};

}  // namespace penstock
