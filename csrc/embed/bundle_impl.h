// What a Bundle holds. Const after load but for the pool of buffers, which has a lock of its own.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "embed/manifest.h"
#include "model/tree_ensemble.h"

namespace penstock {

struct Bundle::Impl {
  BundleManifest manifest;
  std::shared_ptr<const TreeEnsemble> trees;
  mutable std::mutex mutex;
  mutable std::vector<std::unique_ptr<TreeEnsemble::Scratch>> idle;
};

}  // namespace penstock
