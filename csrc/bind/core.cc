#include "bind/bind.h"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  m.doc() = "Native core of Penstock.";
  penstock::bind::bind_base(m);
  penstock::bind::bind_wire(m);
  penstock::bind::bind_model(m);
  penstock::bind::bind_cache(m);
  penstock::bind::bind_drift(m);
  penstock::bind::bind_features(m);
  penstock::bind::bind_events(m);
  penstock::bind::bind_backends(m);
  penstock::bind::bind_engine(m);
  penstock::bind::bind_load(m);
  penstock::bind::bind_reader(m);
  penstock::bind::bind_push(m);
}
