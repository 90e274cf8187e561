// How a FeatureCache comes to be: in memory of its own, in a new file, or in one that another process made.
#include <unistd.h>

#include <algorithm>
#include <string>

#include "cache/arena.h"
#include "cache/feature_cache_layout.h"

namespace penstock {

// At most 2^40 slots of 2^14 + 64 bytes: no sum overflows 64 bits.
Status FeatureCache::geometry_of(const FeatureCacheConfig& config, Geometry* out) {
  constexpr uint64_t kMaxCapacity = uint64_t{1} << 40;
  if (config.capacity == 0 || config.capacity > kMaxCapacity) {
    return Status::invalid("capacity is " + std::to_string(config.capacity) + "; expected 1 to 2**40 rows");
  }
  if (config.row_words == 0 || config.row_words > kMaxRowWords) {
    return Status::invalid("row_words is " + std::to_string(config.row_words) + "; expected 1 to " +
                           std::to_string(kMaxRowWords));
  }
  if (!(config.refresh_ahead >= 0 && config.refresh_ahead <= 0.5)) {
    return Status::invalid("refresh_ahead is " + std::to_string(config.refresh_ahead) +
                           "; expected 0 to 0.5");
  }
  *out = Geometry((config.capacity + kWays - 1) / kWays, align_up(kMetaWords + config.row_words, 8));
  return {};
}

void FeatureCache::write_header(void* arena, const FeatureCacheConfig& config, const Geometry& geometry) {
  auto* header = new (arena) Header{};
  header->layout_version = kLayoutVersion;
  header->n_buckets = geometry.n_buckets;
  header->row_words = config.row_words;
  header->slot_stride = geometry.slot_stride;
  header->ttl_ns = std::max<int64_t>(config.ttl_ns, 0);
  header->negative_ttl_ns = std::max<int64_t>(config.negative_ttl_ns, 0);
  header->bytes = geometry.bytes;
  header->identity = config.identity;
  // Release: pairs with the acquire in attach, for a process that has the descriptor early.
  sync::store(header->magic, kArenaMagic, sync::kRelease);
}

Status FeatureCache::create(const FeatureCacheConfig& config, std::unique_ptr<FeatureCache>* out) {
  Geometry geometry;
  if (Status status = geometry_of(config, &geometry); !status.is_ok()) return status;
  void* at;
  if (Status status = arena::map_private(geometry.bytes, &at); !status.is_ok()) return status;
  write_header(at, config, geometry);
  out->reset(new FeatureCache(at, geometry.bytes, config.refresh_ahead));
  return {};
}

Status FeatureCache::create_in(int fd, const FeatureCacheConfig& config, std::unique_ptr<FeatureCache>* out) {
  Geometry geometry;
  if (Status status = geometry_of(config, &geometry); !status.is_ok()) return status;
  void* at;
  if (Status status = arena::map_new(fd, geometry.bytes, &at); !status.is_ok()) return status;
  write_header(at, config, geometry);
  out->reset(new FeatureCache(at, geometry.bytes, config.refresh_ahead));
  return {};
}

Status FeatureCache::attach(int fd, const FeatureCacheConfig* expected, std::unique_ptr<FeatureCache>* out) {
  void* at;
  size_t bytes;
  if (Status status = arena::map_existing(fd, sizeof(Header), &at, &bytes); !status.is_ok()) return status;
  auto& header = *static_cast<Header*>(at);
  std::string fault;
  const auto differs = [&](const char* what, uint64_t found, uint64_t wanted) {
    if (fault.empty() && found != wanted)
      fault = std::string(what) + " " + std::to_string(found) + ", not " + std::to_string(wanted);
  };
  if (sync::load(header.magic, sync::kAcquire) != kArenaMagic) {  // pairs with the release in write_header
    fault = "another magic number";
  } else {
    differs("layout version", header.layout_version, kLayoutVersion);
  }
  if (fault.empty()) {
    const bool sane = header.n_buckets != 0 && header.n_buckets <= (uint64_t{1} << 40) / kWays + 1 &&
                      header.row_words != 0 && header.row_words <= kMaxRowWords &&
                      header.slot_stride == align_up(kMetaWords + header.row_words, 8);
    if (!sane) fault = "an impossible geometry";
  }
  if (fault.empty()) {
    differs("a size of", header.bytes, Geometry(header.n_buckets, header.slot_stride).bytes);
    differs("a file of", bytes, header.bytes);
  }
  if (fault.empty() && expected != nullptr) {
    Geometry geometry;
    if (Status status = geometry_of(*expected, &geometry); !status.is_ok()) {
      arena::unmap(at, bytes);
      return status;
    }
    differs("identity", header.identity, expected->identity);
    differs("rows of words", header.row_words, expected->row_words);
    differs("buckets", header.n_buckets, geometry.n_buckets);
    differs("a ttl in ns of", static_cast<uint64_t>(header.ttl_ns),
            static_cast<uint64_t>(std::max<int64_t>(expected->ttl_ns, 0)));
    differs("a negative ttl in ns of", static_cast<uint64_t>(header.negative_ttl_ns),
            static_cast<uint64_t>(std::max<int64_t>(expected->negative_ttl_ns, 0)));
  }
  if (!fault.empty()) {
    arena::unmap(at, bytes);
    return {Code::kFailedPrecondition, "it is no arena of this cache: it has " + fault};
  }
  out->reset(new FeatureCache(at, bytes, expected == nullptr ? 0 : expected->refresh_ahead));
  return {};
}

Status FeatureCache::open_shared(const std::string& path, const FeatureCacheConfig& config,
                                 std::unique_ptr<FeatureCache>* out) {
  constexpr int kTries = 8;  // a file may be removed between two steps
  for (int i = 0; i < kTries; ++i) {
    int fd;
    if (Status status = arena::open_file(path, &fd); !status.is_ok()) return status;
    if (fd >= 0) {
      Status status = attach(fd, &config, out);
      ::close(fd);
      if (!status.is_ok()) status.message = "arena '" + path + "': " + status.message;
      return status;
    }
    bool made = false;
    const auto fill = [&](int file) { return create_in(file, config, out); };
    if (Status status = arena::publish_file(path, fill, &made); !status.is_ok()) return status;
    if (made) return {};
  }
  return {Code::kUnavailable, "arena '" + path + "' is made and removed all the time"};
}

FeatureCache::FeatureCache(void* arena, size_t bytes, double refresh_ahead)
    : base_(static_cast<uint8_t*>(arena)), bytes_(bytes), refresh_ahead_(refresh_ahead) {
  n_buckets_ = header().n_buckets;
  row_words_ = static_cast<uint32_t>(header().row_words);
  slot_stride_ = header().slot_stride;
  ttl_ns_ = header().ttl_ns;
  negative_ttl_ns_ = header().negative_ttl_ns;
  const Geometry geometry(n_buckets_, slot_stride_);
  buckets_at_ = geometry.buckets_at;
  sides_at_ = geometry.sides_at;
  slots_at_ = geometry.slots_at;
  refresh_ahead_ns_ = static_cast<int64_t>(refresh_ahead * static_cast<double>(ttl_ns_));
  if (refresh_ahead > 0) refreshes_ = std::make_unique<RefreshQueue>();
}

FeatureCache::~FeatureCache() {
  arena::unmap(base_, bytes_);
}

}  // namespace penstock
