// What onnx_session.cc calls of onnxruntime, whose library is found at run time: nothing of it is needed to
// build.
//
// Its C API is one table of functions that only grows: neither positions nor signatures of a version change.
// These are of version 5 (onnxruntime 1.5); OrtApi in onnxruntime_c_api.h lists them all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace penstock {

struct OrtStatus;
struct OrtEnv;
struct OrtSessionOptions;
struct OrtSession;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtValue;

// What the library's only symbol, OrtGetApiBase, returns.
struct OrtApiBase {
  const void* const* (*api)(uint32_t version);  // null: not of this library
  const char* (*version)();
};

struct OnnxApi {
  static constexpr uint32_t kVersion = 5;
  static constexpr int kErrorsOnly = 3;  // OrtLoggingLevel
  static constexpr int kSequential = 0;  // ExecutionMode
  static constexpr int kFloat = 1;       // ONNXTensorElementDataType
  static constexpr int kDouble = 11;
  static constexpr int kDeviceAllocator = 0;
  static constexpr int kDefaultMemory = 0;

  // Each returns null or a status to release.
  OrtStatus* (*create_env)(int level, const char* name, OrtEnv** out);
  OrtStatus* (*create_session)(const OrtEnv*, const void* model, size_t bytes, const OrtSessionOptions*,
                               OrtSession** out);
  OrtStatus* (*run)(OrtSession*, const OrtRunOptions*, const char* const* input_names,
                    const OrtValue* const* inputs, size_t n_inputs, const char* const* output_names,
                    size_t n_outputs, OrtValue** outputs);
  OrtStatus* (*create_session_options)(OrtSessionOptions** out);
  OrtStatus* (*set_execution_mode)(OrtSessionOptions*, int mode);
  OrtStatus* (*set_log_level)(OrtSessionOptions*, int level);
  OrtStatus* (*set_intra_op_threads)(OrtSessionOptions*, int threads);
  OrtStatus* (*set_inter_op_threads)(OrtSessionOptions*, int threads);
  OrtStatus* (*add_config_entry)(OrtSessionOptions*, const char* key, const char* value);
  OrtStatus* (*count_inputs)(const OrtSession*, size_t* out);
  OrtStatus* (*count_outputs)(const OrtSession*, size_t* out);
  OrtStatus* (*input_name)(const OrtSession*, size_t index, OrtAllocator*, char** out);
  OrtStatus* (*output_name)(const OrtSession*, size_t index, OrtAllocator*, char** out);
  OrtStatus* (*create_run_options)(OrtRunOptions** out);
  OrtStatus* (*terminate)(OrtRunOptions*);
  OrtStatus* (*create_tensor)(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                              size_t rank, int dtype, OrtValue** out);
  OrtStatus* (*create_cpu_memory_info)(int allocator, int memory, OrtMemoryInfo** out);
  OrtStatus* (*free)(OrtAllocator*, void* memory);
  OrtStatus* (*default_allocator)(OrtAllocator** out);  // the library's own

  const char* (*message)(const OrtStatus*);
  void (*release_status)(OrtStatus*);
  void (*release_memory_info)(OrtMemoryInfo*);
  void (*release_session)(OrtSession*);
  void (*release_value)(OrtValue*);
  void (*release_run_options)(OrtRunOptions*);
  void (*release_session_options)(OrtSessionOptions*);

  explicit OnnxApi(const void* const* table) {
    const auto take = [&](size_t at, auto* out) { std::memcpy(out, &table[at], sizeof *out); };
    take(2, &message);
    take(3, &create_env);
    take(8, &create_session);
    take(9, &run);
    take(10, &create_session_options);
    take(13, &set_execution_mode);
    take(22, &set_log_level);
    take(24, &set_intra_op_threads);
    take(25, &set_inter_op_threads);
    take(30, &count_inputs);
    take(31, &count_outputs);
    take(36, &input_name);
    take(37, &output_name);
    take(39, &create_run_options);
    take(46, &terminate);
    take(49, &create_tensor);
    take(69, &create_cpu_memory_info);
    take(76, &free);
    take(78, &default_allocator);
    take(93, &release_status);
    take(94, &release_memory_info);
    take(95, &release_session);
    take(96, &release_value);
    take(97, &release_run_options);
    take(100, &release_session_options);
    take(130, &add_config_entry);
  }
};

}  // namespace penstock
