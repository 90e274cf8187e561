// What csrc/bind/engine.cc takes of the backends that are no trees.
#pragma once

#include <atomic>
#include <memory>
#include <optional>

#include "bind/bind.h"
#include "engine/model.h"

namespace penstock::bind {

// The Model of a PythonModel or a ChildChannel. Throws type_error for anything else.
std::unique_ptr<Model> make_backend_model(const py::handle& given);

// Runs of PythonModels that want the GIL, now or at their end. No partner: a late view costs one wait.
inline std::atomic<int> g_python_runs{0};

// Lets go of the GIL while such a run is in progress. Otherwise its thread, with the loop busy, waits for a
// whole switch interval twice a batch; without such a run, letting go costs more than it gives.
class GiveWay {
 public:
  GiveWay() {
    if (g_python_runs.load(std::memory_order_relaxed) > 0) release_.emplace();
  }

 private:
  std::optional<py::gil_scoped_release> release_;
};

}  // namespace penstock::bind
