#include "engine/feature_reader.h"

#include <algorithm>

#include "wire/msgpack_reader.h"

namespace penstock {

Status FeatureReader::parse(const uint8_t* params, size_t size, Work& work) const {
  wire::FrameScanner scanner(wire::ScanLimits{size_t{1} << 30, 8});
  if (scanner.scan(params, size) != wire::ScanResult::kComplete || scanner.message_bytes() != size)
    return Status::invalid("params is no whole MessagePack value");
  return decode_predict({params, params + size}, &work.call);
}

Status FeatureReader::read(int64_t now_us, int64_t mono_ns, const Overlay* loaded, Work& work,
                           float* out) const {
  const Status status =
      plan_->gather(work.call, now_us, mono_ns, true, loaded, work.scratch, &work.rows, &work.misses);
  if (!status.is_ok() || !work.misses.empty()) return status;
  std::copy_n(work.rows.rows.data(), work.call.rows * plan_->n_features(), out);
  return {};
}

}  // namespace penstock
