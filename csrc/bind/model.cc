#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <string_view>

#include "bind/bind.h"
#include "model/tree_ensemble.h"

namespace penstock::bind {
namespace {

using Rows = py::array_t<float, py::array::c_style>;
using EnsemblePtr = std::shared_ptr<const TreeEnsemble>;

struct PyTrees {
  EnsemblePtr trees;
  // One serves every call: the GIL is held from its first use in a call to the last.
  std::unique_ptr<TreeEnsemble::Scratch> scratch;

  explicit PyTrees(const py::bytes& data) {
    const auto view = static_cast<std::string_view>(data);
    const Status status =
        TreeEnsemble::load(reinterpret_cast<const uint8_t*>(view.data()), view.size(), &trees);
    if (!status.is_ok()) throw py::value_error(status.message);
    scratch = std::make_unique<TreeEnsemble::Scratch>(*trees);
  }

  size_t check(const Rows& rows) const {
    if (rows.ndim() != 2 || rows.shape(1) != static_cast<py::ssize_t>(trees->n_features())) {
      std::string shape;
      for (py::ssize_t i = 0; i < rows.ndim(); ++i) shape += (i ? ", " : "") + std::to_string(rows.shape(i));
      throw py::value_error("rows has shape (" + shape + "); expected (n, " +
                            std::to_string(trees->n_features()) + ")");
    }
    return static_cast<size_t>(rows.shape(0));
  }

  template <class T, class Run>
  py::array_t<T> run(const Rows& rows, size_t width, Run call) const {
    const size_t n = check(rows);
    py::array_t<T> out({n, width});
    (trees.get()->*call)(rows.data(), n, trees->n_features(), out.mutable_data(), *scratch);
    return out;
  }
};

}  // namespace

void bind_model(py::module_& m) {
  py::class_<PyTrees>(m, "TreeEnsemble", "A forest loaded from the bytes of trees.bin; immutable.")
      .def(py::init<const py::bytes&>(), py::arg("data"), "Raises ValueError if data is corrupt.")
      .def_property_readonly("n_features", [](const PyTrees& t) { return t.trees->n_features(); })
      .def_property_readonly("n_outputs", [](const PyTrees& t) { return t.trees->n_outputs(); })
      .def_property_readonly("n_trees", [](const PyTrees& t) { return t.trees->n_trees(); })
      .def(
          "predict",
          [](const PyTrees& t, const Rows& rows) {
            return t.run<double>(rows, t.trees->n_outputs(), &TreeEnsemble::predict);
          },
          py::arg("rows").noconvert(),
          "Transformed scores, float64 [n, n_outputs], of rows float32 [n, n_features]; NaN is missing.\n"
          "Raises ValueError on another shape, TypeError on another dtype.")
      .def(
          "predict_margin",
          [](const PyTrees& t, const Rows& rows) {
            return t.run<double>(rows, t.trees->n_outputs(), &TreeEnsemble::predict_margin);
          },
          py::arg("rows").noconvert(), "As predict, before the transform.")
      .def(
          "predict_leaf",
          [](const PyTrees& t, const Rows& rows) {
            return t.run<int32_t>(rows, t.trees->n_trees(), &TreeEnsemble::predict_leaf);
          },
          py::arg("rows").noconvert(),
          "Leaf reached in each tree, int32 [n, n_trees], numbered from left to right in its tree.");
}

}  // namespace penstock::bind
