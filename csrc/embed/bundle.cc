#include "penstock/bundle.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <exception>

#include "base/sha256.h"
#include "embed/bundle_impl.h"

namespace penstock {
namespace {

constexpr uint64_t kMaxManifestBytes = 16 << 20;

// A regular file, never through a link, and never waiting for a writer of a pipe.
Status open_plain(const std::string& path, int* fd, uint64_t* size) {
  *fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (*fd < 0) {
    if (errno == ENOENT) return Status::invalid(path + ": is missing");
    if (errno == ELOOP) return Status::invalid(path + ": is not a plain file");
    return Status::invalid(path + ": cannot be read: " + std::strerror(errno));
  }
  struct stat found;
  if (fstat(*fd, &found) != 0 || !S_ISREG(found.st_mode)) {
    close(*fd);
    return Status::invalid(path + ": is not a plain file");
  }
  *size = static_cast<uint64_t>(found.st_size);
  return {};
}

// Up to `size` bytes to `out`, if that is not null, and all of them to `digest`.
Status read_all(const std::string& path, int fd, uint64_t size, std::vector<uint8_t>* out, Sha256* digest) {
  std::vector<uint8_t> part(std::min<uint64_t>(size, 1 << 20));
  if (out != nullptr) out->reserve(size);
  for (uint64_t got = 0; got < size;) {
    const ssize_t n = read(fd, part.data(), std::min<uint64_t>(size - got, part.size()));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return Status::invalid(path + ": cannot be read: " + std::strerror(errno));
    if (n == 0) return Status::invalid(path + ": became shorter while it was read");
    digest->update(part.data(), static_cast<size_t>(n));
    if (out != nullptr) out->insert(out->end(), part.begin(), part.begin() + n);
    got += static_cast<uint64_t>(n);
  }
  return {};
}

// expected: what model.yaml says; null for model.yaml itself.
Status read_plain(const std::string& folder, const std::string& name, const BundleFile* expected,
                  std::vector<uint8_t>* out) {
  const std::string path = folder + "/" + name;
  int fd = -1;
  uint64_t size = 0;
  if (Status status = open_plain(path, &fd, &size); !status.is_ok()) return status;
  const struct Closer {
    int fd;
    ~Closer() { close(fd); }
  } closer{fd};
  if (expected == nullptr && size > kMaxManifestBytes) {
    return Status::invalid(path + ": has " + std::to_string(size) + " bytes; expected at most " +
                           std::to_string(kMaxManifestBytes));
  }
  if (expected != nullptr && size != expected->size) {
    return Status::invalid(path + ": has " + std::to_string(size) + " bytes; model.yaml says " +
                           std::to_string(expected->size));
  }
  Sha256 digest;
  if (Status status = read_all(path, fd, size, out, &digest); !status.is_ok()) return status;
  if (expected != nullptr && digest.hex_digest() != expected->sha256)
    return Status::invalid(path + ": its sha256 is not the one in model.yaml");
  return {};
}

Status load_into(const std::string& folder, BundleManifest* manifest,
                 std::shared_ptr<const TreeEnsemble>* trees) {
  struct stat found;
  if (stat(folder.c_str(), &found) != 0 || !S_ISDIR(found.st_mode))
    return Status::not_found(folder + ": is no folder; expected a model bundle");
  std::vector<uint8_t> data;
  if (Status status = read_plain(folder, "model.yaml", nullptr, &data); !status.is_ok()) return status;
  const std::string_view text(reinterpret_cast<const char*>(data.data()), data.size());
  if (Status status = parse_manifest(text, manifest); !status.is_ok()) {
    status.message = folder + "/model.yaml: " + status.message;
    return status;
  }
  for (const BundleFile& file : manifest->files) {
    const bool kept = file.name == "trees.bin";
    if (kept) data.clear();
    if (Status status = read_plain(folder, file.name, &file, kept ? &data : nullptr); !status.is_ok())
      return status;
  }
  const std::string path = folder + "/trees.bin";
  if (Status status = TreeEnsemble::load(data.data(), data.size(), trees); !status.is_ok()) {
    status.message = path + ": " + status.message;
    return status;
  }
  if ((*trees)->n_features() != manifest->inputs.size()) {
    return Status::invalid(path + ": has " + std::to_string((*trees)->n_features()) +
                           " features; model.yaml has " + std::to_string(manifest->inputs.size()) +
                           " inputs");
  }
  const size_t labels = manifest->classes.size(), outputs = (*trees)->n_outputs();
  if (labels != 0 && labels != (outputs > 1 ? outputs : 2)) {
    return Status::invalid(folder + "/model.yaml: output.classes has " + std::to_string(labels) +
                           " labels; the model has " + std::to_string(outputs) + " outputs");
  }
  return {};
}

const BundleManifest& empty_manifest() {
  static const BundleManifest empty;
  return empty;
}

}  // namespace

Bundle::Bundle() noexcept = default;
Bundle::Bundle(const Bundle&) noexcept = default;
Bundle::Bundle(Bundle&&) noexcept = default;
Bundle& Bundle::operator=(const Bundle&) noexcept = default;
Bundle& Bundle::operator=(Bundle&&) noexcept = default;
Bundle::~Bundle() = default;

Status Bundle::load(const std::string& folder, Bundle* out) noexcept try {
  const auto made = std::make_shared<Impl>();
  if (Status status = load_into(folder, &made->manifest, &made->trees); !status.is_ok()) return status;
  made->idle.push_back(std::make_unique<TreeEnsemble::Scratch>(*made->trees));
  out->impl_ = made;
  return {};
} catch (const std::exception&) {
  return {Code::kResourceExhausted, "no memory"};
}

const std::string& Bundle::name() const noexcept {
  return (impl_ == nullptr ? empty_manifest() : impl_->manifest).name;
}
const std::string& Bundle::version() const noexcept {
  return (impl_ == nullptr ? empty_manifest() : impl_->manifest).version;
}
const std::vector<Bundle::Input>& Bundle::inputs() const noexcept {
  return (impl_ == nullptr ? empty_manifest() : impl_->manifest).inputs;
}
size_t Bundle::n_outputs() const noexcept {
  return impl_ == nullptr ? 0 : impl_->trees->n_outputs();
}
const std::string& Bundle::output_kind() const noexcept {
  return (impl_ == nullptr ? empty_manifest() : impl_->manifest).output_kind;
}
const std::vector<std::string>& Bundle::classes() const noexcept {
  return (impl_ == nullptr ? empty_manifest() : impl_->manifest).classes;
}
const std::string& Bundle::service() const noexcept {
  return (impl_ == nullptr ? empty_manifest() : impl_->manifest).service;
}

Status Bundle::predict(std::span<const float> rows, size_t n, std::span<double> out) const noexcept try {
  if (impl_ == nullptr) return {Code::kFailedPrecondition, "no bundle is loaded"};
  const TreeEnsemble& trees = *impl_->trees;
  const size_t width = trees.n_features(), outputs = trees.n_outputs();
  if (n > SIZE_MAX / std::max(width, outputs) || rows.size() != n * width) {
    return Status::invalid("rows has " + std::to_string(rows.size()) + " values; expected " +
                           std::to_string(n) + " rows of " + std::to_string(width));
  }
  if (out.size() != n * outputs) {
    return Status::invalid("out has room for " + std::to_string(out.size()) + " scores; expected " +
                           std::to_string(n) + " rows of " + std::to_string(outputs));
  }
  std::unique_ptr<TreeEnsemble::Scratch> scratch;
  {
    const std::lock_guard lock(impl_->mutex);
    if (!impl_->idle.empty()) {
      scratch = std::move(impl_->idle.back());
      impl_->idle.pop_back();
    }
  }
  if (scratch == nullptr) scratch = std::make_unique<TreeEnsemble::Scratch>(trees);
  trees.predict(rows.data(), n, width, out.data(), *scratch);
  const std::lock_guard lock(impl_->mutex);
  impl_->idle.push_back(std::move(scratch));
  return {};
} catch (const std::exception&) {
  return {Code::kResourceExhausted, "no memory"};
}

}  // namespace penstock
