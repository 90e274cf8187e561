// model.yaml of a bundle of trees, checked as engine/penstock/models/manifest.py does. Stateless; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "penstock/bundle.h"

namespace penstock {

struct BundleFile {
  std::string name, sha256;
  uint64_t size = 0;
};

struct BundleManifest {
  std::string name, version, service, output_kind;
  std::vector<Bundle::Input> inputs;
  std::vector<std::string> classes;
  std::vector<BundleFile> files;
};

// FAILED_PRECONDITION: the format is not "trees".
Status parse_manifest(std::string_view text, BundleManifest* out);

}  // namespace penstock
