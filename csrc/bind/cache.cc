// Python faces of the key hash and the feature cache.
#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/key.h"
#include "bind/bind.h"
#include "cache/feature_cache.h"

namespace penstock::bind {
namespace {

std::string describe(const py::handle& value) {
  if (!py::isinstance<py::array>(value)) return py::str(py::type::of(value).attr("__name__"));
  const auto array = py::reinterpret_borrow<py::array>(value);
  return std::string(py::str(array.dtype())) + std::string(py::str(array.attr("shape")));
}

[[noreturn]] void refuse_array(const py::handle& value, const char* name, const py::dtype& dtype,
                               py::ssize_t rows, py::ssize_t cols, bool writable) {
  const std::string shape = "[" + (rows < 0 ? std::string("n") : std::to_string(rows)) +
                            (cols == 0 ? "" : ", " + std::to_string(cols)) + "]";
  throw py::value_error(std::string(name) + " is " + describe(value) + "; expected a C-contiguous " +
                        std::string(py::str(dtype)) + " array of shape " + shape +
                        (writable ? ", writable" : ""));
}

// The data of a C-contiguous array of T with shape [rows] (cols == 0) or [rows, cols]; rows < 0: any number.
// Nothing is built unless the array is refused: a batch read checks five of them within a microsecond.
template <class T>
T* checked(const py::handle& value, const char* name, py::ssize_t rows, py::ssize_t cols, bool writable) {
  using Item = std::remove_const_t<T>;
  const auto& api = py::detail::npy_api::get();
  constexpr int kContiguous = py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_;
  constexpr int kWriteable = py::detail::npy_api::NPY_ARRAY_WRITEABLE_;
  if (api.PyArray_Check_(value.ptr())) {
    const auto* array = py::detail::array_proxy(value.ptr());
    const bool shaped = array->nd == (cols == 0 ? 1 : 2) && (rows < 0 || array->dimensions[0] == rows) &&
                        (cols == 0 || array->dimensions[1] == cols);
    const int flags = kContiguous | (writable ? kWriteable : 0);
    if (shaped && (array->flags & flags) == flags &&
        api.PyArray_EquivTypes_(array->descr, py::dtype::of<Item>().ptr())) {
      return reinterpret_cast<T*>(array->data);
    }
  }
  refuse_array(value, name, py::dtype::of<Item>(), rows, cols, writable);
}

std::vector<Key128> checked_keys(const py::object& keys) {
  const auto* words = checked<const uint64_t>(keys, "keys", -1, 2, false);
  std::vector<Key128> result(static_cast<size_t>(py::len(keys)));
  for (size_t i = 0; i < result.size(); ++i) result[i] = {words[2 * i], words[2 * i + 1]};
  return result;
}

RowMeta row_meta(const int64_t* words) {
  return {words[0], words[1], words[2], words[3]};
}

std::string_view checked_seed(const py::bytes& seed) {
  const auto view = static_cast<std::string_view>(seed);
  if (view.size() != 16) {
    throw py::value_error("seed is " + std::to_string(view.size()) + " bytes; expected 16");
  }
  return view;
}

// Adds one cell of a list column; false for None.
bool add_cell(KeyHasher& hasher, const py::handle& cell, size_t column, size_t row) {
  if (cell.is_none()) return false;
  const auto refuse = [&](const std::string& what) {
    throw py::value_error("columns[" + std::to_string(column) + "][" + std::to_string(row) + "] is " + what +
                          "; expected int64, str, bytes or None");
  };
  if (PyUnicode_Check(cell.ptr())) {
    Py_ssize_t size = 0;
    const char* text = PyUnicode_AsUTF8AndSize(cell.ptr(), &size);
    if (text == nullptr) {
      PyErr_Clear();
      refuse("a str with lone surrogates");
    }
    hasher.add_str({text, static_cast<size_t>(size)});
  } else if (PyBytes_Check(cell.ptr())) {
    hasher.add_bytes({PyBytes_AS_STRING(cell.ptr()), static_cast<size_t>(PyBytes_GET_SIZE(cell.ptr()))});
  } else if (PyLong_Check(cell.ptr()) && !PyBool_Check(cell.ptr())) {
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(cell.ptr(), &overflow);
    if (overflow != 0) refuse("an int beyond int64");
    hasher.add_int(value);
  } else {
    refuse(describe(cell));
  }
  return true;
}

py::tuple keys128(const py::list& columns, const py::bytes& seed) {
  KeyHasher hasher(reinterpret_cast<const uint8_t*>(checked_seed(seed).data()));
  const size_t n_columns = columns.size();
  if (n_columns == 0) throw py::value_error("columns is empty; expected at least one column");
  std::vector<const int64_t*> ints(n_columns, nullptr);
  size_t n = 0;
  for (size_t c = 0; c < n_columns; ++c) {
    const py::object column = columns[c];
    const std::string name = "columns[" + std::to_string(c) + "]";
    if (!py::isinstance<py::list>(column))
      ints[c] = checked<const int64_t>(column, name.c_str(), -1, 0, false);
    if (c == 0) n = py::len(column);
    if (py::len(column) != n) {
      throw py::value_error(name + " has " + std::to_string(py::len(column)) + " rows; expected " +
                            std::to_string(n));
    }
  }
  py::array_t<uint64_t> keys({static_cast<py::ssize_t>(n), py::ssize_t{2}});
  py::array_t<bool> nulls(static_cast<py::ssize_t>(n));
  uint64_t* out = keys.mutable_data();
  bool* null = nulls.mutable_data();
  for (size_t row = 0; row < n; ++row) {
    hasher.reset();
    null[row] = false;
    for (size_t c = 0; c < n_columns; ++c) {
      if (ints[c] != nullptr) {
        hasher.add_int(ints[c][row]);
      } else if (!add_cell(hasher, PyList_GET_ITEM(PyList_GET_ITEM(columns.ptr(), c), row), c, row)) {
        null[row] = true;
      }
    }
    const Key128 key = null[row] ? Key128{0, 0} : hasher.finish();
    out[2 * row] = key.lo;
    out[2 * row + 1] = key.hi;
  }
  return py::make_tuple(keys, nulls);
}

py::bytes siphash128(const py::bytes& data, const py::bytes& seed) {
  SipHash128 hash(reinterpret_cast<const uint8_t*>(checked_seed(seed).data()));
  const auto view = static_cast<std::string_view>(data);
  hash.add(view.data(), view.size());
  uint64_t words[2];
  hash.finish(&words[0], &words[1]);
  return {reinterpret_cast<const char*>(words), sizeof words};
}

void require(const Status& status) {
  if (status.code == Code::kInvalidArgument) throw py::value_error(status.message);
  if (!status.is_ok()) throw std::runtime_error(status.message);
}

std::unique_ptr<FeatureCache> make_cache(uint64_t capacity, uint32_t row_words, int64_t ttl_ns,
                                         int64_t negative_ttl_ns, double refresh_ahead) {
  std::unique_ptr<FeatureCache> cache;
  require(FeatureCache::create({capacity, row_words, ttl_ns, negative_ttl_ns, refresh_ahead}, &cache));
  return cache;
}

std::unique_ptr<FeatureCache> open_shared(const std::string& path, uint64_t capacity, uint32_t row_words,
                                          int64_t ttl_ns, int64_t negative_ttl_ns, double refresh_ahead,
                                          uint64_t identity) {
  std::unique_ptr<FeatureCache> cache;
  require(FeatureCache::open_shared(
      path, {capacity, row_words, ttl_ns, negative_ttl_ns, refresh_ahead, identity}, &cache));
  return cache;
}

std::unique_ptr<FeatureCache> attach(int fd) {
  std::unique_ptr<FeatureCache> cache;
  require(FeatureCache::attach(fd, nullptr, &cache));
  return cache;
}

py::tuple take_refreshes(FeatureCache& self, size_t n) {
  std::vector<RefreshQueue::Item> items(n);
  const auto size = static_cast<py::ssize_t>(self.take_refreshes(n, items.data()));
  py::array_t<uint64_t> keys({size, py::ssize_t{2}});
  py::array_t<int64_t> at_us(size);
  py::array_t<bool> hold(size);
  for (py::ssize_t i = 0; i < size; ++i) {
    const RefreshQueue::Item& item = items[static_cast<size_t>(i)];
    keys.mutable_data()[2 * i] = item.key.lo;
    keys.mutable_data()[2 * i + 1] = item.key.hi;
    at_us.mutable_data()[i] = item.at_us;
    hold.mutable_data()[i] = item.hold;
  }
  return py::make_tuple(keys, at_us, hold);
}

size_t get_many(FeatureCache& self, const py::object& keys, int64_t now_us, int64_t mono_ns,
                const py::object& out, const py::object& status, const py::object& meta,
                const py::object& versions) {
  static_assert(sizeof(Key128) == 16 && sizeof(RowMeta) == 32);
  const auto* words = checked<const uint64_t>(keys, "keys", -1, 2, false);
  const auto n = static_cast<py::ssize_t>(py::len(keys));
  auto* rows = checked<uint64_t>(out, "out", n, self.row_words(), true);
  auto* codes = checked<uint8_t>(status, "status", n, 0, true);
  auto* metas = meta.is_none() ? nullptr : checked<int64_t>(meta, "meta", n, 4, true);
  auto* stamps = versions.is_none() ? nullptr : checked<uint64_t>(versions, "slot_versions", n, 0, true);
  return self.get_many(reinterpret_cast<const Key128*>(words), static_cast<size_t>(n), now_us, mono_ns, rows,
                       reinterpret_cast<ReadStatus*>(codes), reinterpret_cast<RowMeta*>(metas), stamps);
}

py::array_t<uint8_t> put_many(FeatureCache& self, const py::object& keys, const py::object& rows,
                              const py::object& meta, uint64_t stamp, int64_t mono_ns, uint32_t owner) {
  const std::vector<Key128> list = checked_keys(keys);
  const auto n = static_cast<py::ssize_t>(list.size());
  const auto* words = checked<const uint64_t>(rows, "rows", n, self.row_words(), false);
  const auto* metas = checked<const int64_t>(meta, "meta", n, 4, false);
  py::array_t<uint8_t> result(n);
  for (size_t i = 0; i < list.size(); ++i) {
    result.mutable_data()[i] = static_cast<uint8_t>(
        self.put(list[i], words + i * self.row_words(), row_meta(metas + 4 * i), stamp, mono_ns, owner));
  }
  return result;
}

py::array_t<bool> resident_many(const FeatureCache& self, const py::object& keys) {
  const std::vector<Key128> list = checked_keys(keys);
  py::array_t<bool> out(static_cast<py::ssize_t>(list.size()));
  for (size_t i = 0; i < list.size(); ++i) out.mutable_data()[i] = self.is_resident(list[i]);
  return out;
}

size_t discard_many(FeatureCache& self, const py::object& keys, uint64_t stamp, uint32_t owner) {
  size_t removed = 0;
  for (const Key128& key : checked_keys(keys)) removed += self.discard(key, stamp, owner) ? 1 : 0;
  return removed;
}

void abandon_put(FeatureCache& self, const py::object& key, const py::object& row, const py::object& meta,
                 uint64_t stamp, int64_t mono_ns, uint32_t owner, uint32_t words) {
  const auto* k = checked<const uint64_t>(key, "key", 2, 0, false);
  const auto* r = checked<const uint64_t>(row, "row", self.row_words(), 0, false);
  const auto* m = checked<const int64_t>(meta, "meta", 4, 0, false);
  self.abandon_put_for_test({k[0], k[1]}, r, row_meta(m), stamp, mono_ns, owner, words);
}

py::dict stats(const FeatureCache& self) {
  const FeatureCacheStats s = self.stats();
  using namespace py::literals;
  return py::dict("hits"_a = s.hits, "misses"_a = s.misses, "expired"_a = s.expired, "busy"_a = s.busy,
                  "puts"_a = s.puts, "superseded"_a = s.superseded, "evictions"_a = s.evictions,
                  "lock_takeovers"_a = s.lock_takeovers, "size"_a = s.size, "capacity"_a = s.capacity,
                  "bytes"_a = s.bytes, "negative_puts"_a = s.negative_puts,
                  "refreshes_queued"_a = s.refreshes_queued, "refreshes_dropped"_a = s.refreshes_dropped);
}

}  // namespace

void bind_cache(py::module_& m) {
  m.def("keys128", &keys128, py::arg("columns"), py::arg("seed"),
        "Entity keys of n rows. columns: one int64[n] array or list of int, str, bytes or None per join key, "
        "in "
        "order; seed: 16 bytes. Returns (keys uint64[n, 2] as lo, hi; nulls bool[n]); a null key's words are "
        "0. "
        "Raises ValueError naming the column, row and value.");
  m.def("siphash128", &siphash128, py::arg("data"), py::arg("seed"),
        "SipHash-2-4 with 128-bit output of data under a 16-byte seed, as 16 bytes.");
  py::class_<FeatureCache, py::smart_holder>(
      m, "FeatureCache",
      "Fixed-capacity cache of feature rows. Reads are lock-free; a write locks one bucket.")
      .def(
          py::init(&make_cache), py::arg("capacity"), py::arg("row_words"), py::arg("ttl_ns") = 0,
          py::arg("negative_ttl_ns") = 0, py::arg("refresh_ahead") = 0.0,
          "capacity: rows, rounded up to whole buckets of 15; row_words: uint64 words a row, 1 to 2048; "
          "ttl_ns: memory TTL, none if <= 0; negative_ttl_ns: a shorter one of rows that say NOT_FOUND; "
          "refresh_ahead: last part of a row's life, 0 to 0.5, in which a read queues it for take_refreshes. "
          "Raises ValueError, or RuntimeError if the memory cannot be mapped.")
      .def_static(
          "open_shared", &open_shared, py::arg("path"), py::arg("capacity"), py::arg("row_words"),
          py::arg("ttl_ns") = 0, py::arg("negative_ttl_ns") = 0, py::arg("refresh_ahead") = 0.0,
          py::arg("identity") = 0,
          "The cache in the file at `path`, which several processes share and the first one makes. "
          "identity: uint64 of the key hash and row layout. Raises RuntimeError, naming what differs, "
          "where the file holds another kind of arena.")
      .def_static("attach", &attach, py::arg("fd"),
                  "The cache in an open file, whatever its geometry. Raises RuntimeError if it is no arena.")
      .def_property_readonly("row_words", &FeatureCache::row_words)
      .def("take_refreshes", &take_refreshes, py::arg("n"),
           "Up to n rows that were read shortly before their end: keys uint64[k, 2], request times to load "
           "them for int64[k], and hold bool[k]: not to be stored before that time.")
      .def("get_many", &get_many, py::arg("keys"), py::arg("now_us"), py::arg("mono_ns"), py::arg("out"),
           py::arg("status"), py::arg("meta") = py::none(), py::arg("slot_versions") = py::none(),
           "Read keys uint64[n, 2] into out uint64[n, row_words], status uint8[n] (0 hit, 1 miss, 2 expired, "
           "3 "
           "busy) and, if given, meta int64[n, 4] and slot_versions uint64[n]. Rows of non-hits are left as "
           "they "
           "were. Returns the number of hits. Raises ValueError naming the array.")
      .def("put_many", &put_many, py::arg("keys"), py::arg("rows"), py::arg("meta"), py::arg("stamp"),
           py::arg("mono_ns"), py::arg("owner") = 0,
           "Store rows uint64[n, row_words] with meta int64[n, 4] (valid_from, valid_until, event_time, "
           "known_at; "
           "us). Returns uint8[n]: 0 stored, 1 replaced, 2 superseded. Raises ValueError naming the array.")
      .def("resident_many", &resident_many, py::arg("keys"),
           "Which keys uint64[n, 2] have a row, valid or not: bool[n]. A hint; counts as no read.")
      .def(
          "discard_many", &discard_many, py::arg("keys"), py::arg("stamp"), py::arg("owner") = 0,
          "Remove keys uint64[n, 2] whose rows have no greater stamp, and refuse lesser stamps from then on. "
          "Returns how many were removed.")
      .def("clear", &FeatureCache::clear, py::arg("owner") = 0, py::arg("stamp") = 0,
           "Remove every row; the stamps are remembered, and lesser ones than `stamp` are refused from then "
           "on.")
      .def("reclaim_owner", &FeatureCache::reclaim_owner, py::arg("dead"), py::arg("survivor") = 0,
           "Take over the bucket locks of a writer known to have ended and empty what it left half-written. "
           "Returns the number of locks.")
      .def("stats", &stats, "Counters and sizes, by name.")
      .def("_abandon_put", &abandon_put, py::arg("key"), py::arg("row"), py::arg("meta"), py::arg("stamp"),
           py::arg("mono_ns"), py::arg("owner"), py::arg("words"),
           "For tests: a put that stops after `words` words with the bucket locked.");
}

}  // namespace penstock::bind
