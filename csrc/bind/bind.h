// One function per area adds that area's classes to the module `_core`. Only csrc/bind includes pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "base/status.h"

namespace penstock::bind {

namespace py = pybind11;

void bind_base(py::module_& m);
void bind_wire(py::module_& m);
void bind_model(py::module_& m);
void bind_cache(py::module_& m);
void bind_drift(py::module_& m);
void bind_features(py::module_& m);
void bind_events(py::module_& m);
void bind_backends(py::module_& m);
void bind_connection(py::module_& m);
void bind_engine(py::module_& m);
void bind_load(py::module_& m);

// The canonical code of that name; ValueError.
Code code_of(const std::string& name);

}  // namespace penstock::bind
