// What csrc/bind/engine.cc takes of the backends that are no trees.
#pragma once

#include <memory>

#include "bind/bind.h"
#include "engine/model.h"

namespace penstock::bind {

// The Model of a PythonModel or a ChildChannel. Throws type_error for anything else.
std::unique_ptr<Model> make_backend_model(const py::handle& given);

}  // namespace penstock::bind
