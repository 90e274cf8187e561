// One function per area adds that area's classes to the module `_core`. Only csrc/bind includes pybind11.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>
#include <string>

#include "base/status.h"

namespace penstock {
class EventTable;
class ServicePlan;
}  // namespace penstock

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
void bind_reader(py::module_& m);
void bind_push(py::module_& m);

// The native form of a feature service, from the mapping that ServingCore.load takes; ValueError.
std::shared_ptr<const ServicePlan> service_plan_of(const py::dict& given);

// The table of an EventTable, which keeps its arrays; let go of it with the GIL held. A cast_error for
// anything else.
std::shared_ptr<EventTable> event_table_of(const py::handle& given);

// The canonical code of that name; ValueError.
Code code_of(const std::string& name);

}  // namespace penstock::bind
