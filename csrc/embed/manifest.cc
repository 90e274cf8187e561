#include "embed/manifest.h"

#include <algorithm>
#include <initializer_list>
#include <set>
#include <unordered_set>
#include <utility>

#include "embed/block_yaml.h"

namespace penstock {
namespace {

using Kind = YamlNode::Kind;

bool is_digit(char c) {
  return c >= '0' && c <= '9';
}

bool is_component(std::string_view text) {
  const auto letter = [](char c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
  return !text.empty() && text.size() <= 128 && letter(text[0]) &&
         std::all_of(text.begin(), text.end(),
                     [&](char c) { return letter(c) || c == '.' || c == '_' || c == '-'; });
}

bool is_hash(std::string_view text) {
  return text.size() == 64 &&
         std::all_of(text.begin(), text.end(), [](char c) { return is_digit(c) || (c >= 'a' && c <= 'f'); });
}

// A plain scalar that YAML takes for null.
bool is_null(const YamlNode& node) {
  return node.kind == Kind::kScalar && !node.quoted &&
         (node.text.empty() || node.text == "~" || node.text == "null" || node.text == "Null" ||
          node.text == "NULL");
}

bool is_integer(std::string_view text) {
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.remove_prefix(1);
  return !text.empty() && std::all_of(text.begin(), text.end(), is_digit);
}

bool is_string(const YamlNode& node) {
  return node.kind == Kind::kScalar && (node.quoted || (!is_null(node) && !is_integer(node.text) &&
                                                        node.text != "true" && node.text != "false"));
}

Status fault(const std::string& where, const std::string& expected) {
  return Status::invalid(where + " is wrong; expected " + expected);
}

// Every key is there and no other but, perhaps, those of `optional`.
Status check_keys(const YamlNode& node, const std::string& where,
                  std::initializer_list<std::string_view> keys,
                  std::initializer_list<std::string_view> optional = {}) {
  if (node.kind != Kind::kMap) return fault(where, "a mapping");
  const std::string prefix = where == "the file" ? "" : where + ".";
  for (const auto& [name, value] : node.fields) {
    if (std::find(keys.begin(), keys.end(), name) == keys.end() &&
        std::find(optional.begin(), optional.end(), name) == optional.end())
      return Status::invalid("unknown key " + prefix + name);
  }
  for (const std::string_view key : keys) {
    if (node.field(key) == nullptr) return Status::invalid(prefix + std::string(key) + " is missing");
  }
  return {};
}

bool parse_size(const YamlNode& node, uint64_t* out) {
  if (node.quoted || node.text.size() > 18 || node.text.empty() ||
      !std::all_of(node.text.begin(), node.text.end(), is_digit)) {
    return false;
  }
  *out = 0;
  for (const char c : node.text) *out = *out * 10 + static_cast<uint64_t>(c - '0');
  return true;
}

Status read_inputs(const YamlNode& node, std::vector<Bundle::Input>* out) {
  if (node.kind != Kind::kList || node.items.empty()) return fault("inputs", "a list of at least 1");
  std::unordered_set<std::string_view> seen;
  for (const YamlNode& item : node.items) {
    const std::string where = "inputs." + std::to_string(out->size());
    if (Status status = check_keys(item, where, {"name", "dtype"}); !status.is_ok()) return status;
    const YamlNode &name = *item.field("name"), &dtype = *item.field("dtype");
    if (!is_string(name) || name.text.empty()) return fault(where + ".name", "text");
    if (!seen.insert(name.text).second) return Status::invalid("inputs repeats '" + name.text + "'");
    constexpr std::string_view kDtypes[] = {"float32", "float64", "int64", "bool"};
    if (std::find(std::begin(kDtypes), std::end(kDtypes), dtype.text) == std::end(kDtypes))
      return fault(where + ".dtype", "float32, float64, int64 or bool");
    out->push_back({name.text, dtype.text});
  }
  return {};
}

Status read_output(const YamlNode& node, BundleManifest* out) {
  if (Status status = check_keys(node, "output", {"kind", "classes"}); !status.is_ok()) return status;
  out->output_kind = node.field("kind")->text;
  if (out->output_kind != "probability" && out->output_kind != "margin" && out->output_kind != "value")
    return fault("output.kind", "probability, margin or value");
  const YamlNode& classes = *node.field("classes");
  if (classes.kind != Kind::kList) return fault("output.classes", "a list");
  for (const YamlNode& label : classes.items) {
    if (label.kind != Kind::kScalar || is_null(label)) return fault("output.classes", "a list of labels");
    out->classes.push_back(label.text);
  }
  return {};
}

Status read_files(const YamlNode& node, std::vector<BundleFile>* out) {
  if (node.kind != Kind::kMap) return fault("files", "a mapping");
  constexpr std::string_view kFiles[] = {"trees.bin", "reference.arrow"};
  for (const std::string_view name : kFiles) {
    if (node.field(name) == nullptr) return Status::invalid("files lacks " + std::string(name));
  }
  for (const auto& [name, entry] : node.fields) {
    if (std::find(std::begin(kFiles), std::end(kFiles), name) == std::end(kFiles))
      return Status::invalid("files has " + name + ", which is none of reference.arrow, trees.bin");
    if (Status status = check_keys(entry, "files." + name, {"sha256", "size"}); !status.is_ok())
      return status;
    BundleFile file{name, entry.field("sha256")->text};
    if (!is_hash(file.sha256)) return fault("files." + name + ".sha256", "64 hex digits");
    if (!parse_size(*entry.field("size"), &file.size)) return fault("files." + name + ".size", "bytes");
    out->push_back(std::move(file));
  }
  return {};
}

// The dictionaries whose codes reach the model. C++ programs are given codes, so their lengths are checked
// and not kept.
Status check_dictionaries(const YamlNode& node) {
  if (node.kind != Kind::kList || node.items.empty()) return fault("dictionaries", "a list of at least 1");
  std::set<std::pair<std::string_view, std::string_view>> seen;
  for (size_t i = 0; i < node.items.size(); ++i) {
    const YamlNode& item = node.items[i];
    const std::string where = "dictionaries." + std::to_string(i);
    if (Status status = check_keys(item, where, {"source", "column", "texts"}); !status.is_ok())
      return status;
    const YamlNode &source = *item.field("source"), &column = *item.field("column");
    if (!is_string(source) || source.text.empty()) return fault(where + ".source", "text");
    if (!is_string(column) || column.text.empty()) return fault(where + ".column", "text");
    uint64_t texts = 0;
    if (!parse_size(*item.field("texts"), &texts)) return fault(where + ".texts", "a count");
    if (!seen.emplace(source.text, column.text).second)
      return Status::invalid("dictionaries repeats a column of a source");
  }
  return {};
}

}  // namespace

Status parse_manifest(std::string_view text, BundleManifest* out) {
  const std::string_view schema = top_level_line(text, "schema_version");
  if (schema != "1")
    return Status::invalid("schema_version is '" + std::string(schema) + "'; this build reads 1");
  const std::string_view format = top_level_line(text, "format");
  if (format == "onnx" || format == "python") {
    return {Code::kFailedPrecondition,
            "format is " + std::string(format) + "; C++ programs serve bundles of format trees only"};
  }
  YamlNode root;
  if (Status status = parse_block_yaml(text, {"training", "metrics"}, &root); !status.is_ok()) return status;
  if (Status status = check_keys(root, "the file",
                                 {"schema_version", "name", "version", "format", "service", "fingerprint",
                                  "inputs", "output", "files", "training", "metrics"},
                                 {"dictionaries"});
      !status.is_ok()) {
    return status;
  }
  const YamlNode &name = *root.field("name"), &version = *root.field("version");
  const YamlNode &service = *root.field("service"), &fingerprint = *root.field("fingerprint");
  if (root.field("format")->text != "trees") return fault("format", "trees");
  if (!is_string(name) || !is_component(name.text)) return fault("name", "letters, digits, '.', '_', '-'");
  if (!is_string(version) || !is_component(version.text) || version.text == "champion" ||
      version.text == "challenger" || version.text == "previous") {
    return fault("version", "letters, digits, '.', '_', '-', and no alias");
  }
  if (!is_null(service) && (!is_string(service) || service.text.empty()))
    return fault("service", "text or null");
  if (!is_null(fingerprint) && !is_hash(fingerprint.text))
    return fault("fingerprint", "64 hex digits or null");
  if (is_null(service) != is_null(fingerprint))
    return Status::invalid("service and fingerprint must be given together");
  if (const YamlNode* dictionaries = root.field("dictionaries"); dictionaries != nullptr) {
    if (is_null(service)) return Status::invalid("dictionaries is there without a service");
    if (Status status = check_dictionaries(*dictionaries); !status.is_ok()) return status;
  }
  BundleManifest made;
  made.name = name.text;
  made.version = version.text;
  if (!is_null(service)) made.service = service.text;
  if (Status status = read_inputs(*root.field("inputs"), &made.inputs); !status.is_ok()) return status;
  if (Status status = read_output(*root.field("output"), &made); !status.is_ok()) return status;
  if (Status status = read_files(*root.field("files"), &made.files); !status.is_ok()) return status;
  *out = std::move(made);
  return {};
}

}  // namespace penstock
