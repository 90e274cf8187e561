#include "engine/onnx_session.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>

#include "base/text.h"

namespace penstock {

// A library that is loaded, for as long as the process lives.
struct OnnxRuntime {
  OnnxApi api;
  OrtEnv* env = nullptr;
};

namespace {

constexpr size_t kMaxText = 500;

// The first line of a text, bounded.
std::string first_line(const char* text) {
  std::string line(text, strcspn(text, "\n"));
  cut_text(&line, kMaxText);
  return line;
}

Status status_of(const OnnxApi& api, OrtStatus* given, Code code) {
  if (given == nullptr) return {};
  Status status{code, first_line(api.message(given))};
  api.release_status(given);
  return status;
}

Status load(const std::string& path, std::unique_ptr<OnnxRuntime>* out) {
  const auto refused = [&](const std::string& why) {
    return Status{Code::kFailedPrecondition, "onnxruntime's library " + path + ": " + why};
  };
  void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return refused(first_line(dlerror()));
  using Entry = const OrtApiBase* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(library, "OrtGetApiBase"));
  if (entry == nullptr) return refused("has no OrtGetApiBase");
  const OrtApiBase* const base = entry();
  const void* const* const table = base->api(OnnxApi::kVersion);
  if (table == nullptr) return refused(std::string("has no C API of version 5, it is ") + base->version());
  auto made = std::make_unique<OnnxRuntime>(OnnxRuntime{OnnxApi(table)});
  const Status status =
      status_of(made->api, made->api.create_env(OnnxApi::kErrorsOnly, "penstock", &made->env),
                Code::kFailedPrecondition);
  if (!status.is_ok()) return refused(status.message);
  *out = std::move(made);
  return {};
}

Status runtime_at(const std::string& path, const OnnxRuntime** out) {
  static std::mutex mutex;
  static auto& loaded = *new std::map<std::string, std::unique_ptr<OnnxRuntime>>;  // sessions end later
  const std::lock_guard lock(mutex);
  std::unique_ptr<OnnxRuntime>& found = loaded[path];
  if (found == nullptr) {
    if (Status status = load(path, &found); !status.is_ok()) return status;
  }
  *out = found.get();
  return {};
}

// ['a', 'b']
std::string listed(const std::vector<std::string>& names) {
  std::string text = "[";
  for (const std::string& name : names) {
    if (text.size() > 1) text += ", ";
    text += "'" + name + "'";
  }
  return text + "]";
}

}  // namespace

Status OnnxSession::open(const void* model, size_t bytes, const Spec& spec,
                         std::shared_ptr<OnnxSession>* out) {
  const OnnxRuntime* runtime = nullptr;
  if (Status status = runtime_at(spec.library, &runtime); !status.is_ok()) return status;
  std::shared_ptr<OnnxSession> made(new OnnxSession(*runtime, spec));
  if (Status status = made->make(model, bytes); !status.is_ok()) return status;
  *out = std::move(made);
  return {};
}

OnnxSession::OnnxSession(const OnnxRuntime& runtime, const Spec& spec)
    : runtime_(runtime),
      api_(runtime.api),
      spec_(spec),
      rows_(kMaxBatchRows * spec.n_features),
      scores_(
          new std::byte[kMaxBatchRows * spec.rule.width * (spec.wide ? sizeof(double) : sizeof(float))]()) {}

OnnxSession::~OnnxSession() {
  for (size_t i = 0; i < kMaxBatchRows; ++i) {
    api_.release_value(inputs_[i]);
    api_.release_value(outputs_[i]);
  }
  api_.release_run_options(options_);
  api_.release_session(session_);
}

Status OnnxSession::make(const void* model, size_t bytes) {
  if (Status status = make_session(model, bytes); !status.is_ok()) return status;
  if (Status status = check_names(); !status.is_ok()) return status;
  return make_tensors();
}

Status OnnxSession::make_session(const void* model, size_t bytes) {
  OrtSessionOptions* options = nullptr;
  OrtStatus* failed = api_.create_session_options(&options);
  const auto then = [&](auto function, auto... arguments) {
    if (failed == nullptr) failed = function(arguments...);
  };
  then(api_.set_intra_op_threads, options, spec_.threads);
  then(api_.set_inter_op_threads, options, 1);
  then(api_.set_execution_mode, options, OnnxApi::kSequential);
  then(api_.set_log_level, options, OnnxApi::kErrorsOnly);
  // The cores are not ours alone.
  then(api_.add_config_entry, options, "session.intra_op.allow_spinning", "0");
  then(api_.create_session, runtime_.env, model, bytes, options, &session_);
  then(api_.create_run_options, &options_);
  if (options != nullptr) api_.release_session_options(options);
  return status_of(api_, failed, Code::kInvalidArgument);
}

Status OnnxSession::check_names() const {
  OrtAllocator* allocator = nullptr;
  OrtStatus* failed = api_.default_allocator(&allocator);
  std::vector<std::string> inputs, outputs;
  const auto read = [&](auto count, auto name, std::vector<std::string>* names) {
    size_t n = 0;
    if (failed == nullptr) failed = count(session_, &n);
    for (size_t i = 0; i < n && failed == nullptr; ++i) {
      char* text = nullptr;
      failed = name(session_, i, allocator, &text);
      if (failed != nullptr) break;
      names->emplace_back(text);
      failed = api_.free(allocator, text);
    }
  };
  read(api_.count_inputs, api_.input_name, &inputs);
  read(api_.count_outputs, api_.output_name, &outputs);
  if (failed != nullptr) return status_of(api_, failed, Code::kInvalidArgument);
  if (inputs == std::vector{spec_.input} &&
      std::find(outputs.begin(), outputs.end(), spec_.output) != outputs.end())
    return {};
  return Status::invalid("it has inputs " + listed(inputs) + " and outputs " + listed(outputs) +
                         "; expected ['" + spec_.input + "'] and '" + spec_.output + "'");
}

Status OnnxSession::make_tensors() {
  OrtMemoryInfo* memory = nullptr;
  OrtStatus* failed =
      api_.create_cpu_memory_info(OnnxApi::kDeviceAllocator, OnnxApi::kDefaultMemory, &memory);
  const size_t value = spec_.wide ? sizeof(double) : sizeof(float);
  for (size_t n = 1; n <= kMaxBatchRows && failed == nullptr; ++n) {
    const auto rows = static_cast<int64_t>(n);
    const int64_t taken[] = {rows, static_cast<int64_t>(spec_.n_features)};
    const int64_t given[] = {rows, static_cast<int64_t>(spec_.rule.width)};
    failed = api_.create_tensor(memory, rows_.data(), n * spec_.n_features * sizeof(float), taken, 2,
                                OnnxApi::kFloat, &inputs_[n - 1]);
    if (failed != nullptr) break;
    failed =
        api_.create_tensor(memory, scores_.get(), n * spec_.rule.width * value, given, spec_.flat ? 1 : 2,
                           spec_.wide ? OnnxApi::kDouble : OnnxApi::kFloat, &outputs_[n - 1]);
  }
  if (memory != nullptr) api_.release_memory_info(memory);
  return status_of(api_, failed, Code::kInvalidArgument);
}

Status OnnxSession::run(const float* rows, size_t n, double* scores) {
  std::memcpy(rows_.data(), rows, n * spec_.n_features * sizeof(float));
  const char* const input = spec_.input.c_str();
  const char* const output = spec_.output.c_str();
  OrtValue* made = outputs_[n - 1];
  OrtStatus* const failed = api_.run(session_, options_, &input, &inputs_[n - 1], 1, &output, 1, &made);
  if (failed != nullptr) {
    Status status = status_of(api_, failed, Code::kInternal);
    status.message = "the model failed: " + status.message;
    return status;
  }
  if (spec_.wide) {
    spec_.rule.apply(reinterpret_cast<const double*>(scores_.get()), n, scores);
  } else {
    spec_.rule.apply(reinterpret_cast<const float*>(scores_.get()), n, scores);
  }
  return {};
}

void OnnxSession::interrupt() {
  if (OrtStatus* const failed = api_.terminate(options_); failed != nullptr) api_.release_status(failed);
}

}  // namespace penstock
