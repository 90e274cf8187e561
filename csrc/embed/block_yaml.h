// The part of YAML in which save_bundle writes model.yaml: block mappings and lists, `{}`, `[]`, and scalars,
// plain or quoted, folded over lines. Anything else (comments, anchors, tags, literals, flow collections,
// tabs, document marks) is an error that names the line. Stateless; any thread.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace penstock {

struct YamlField;

struct YamlNode {
  enum class Kind : uint8_t { kScalar, kList, kMap };
  Kind kind = Kind::kScalar;
  bool quoted = false;  // a scalar's; a plain one may stand for null, a bool or a number
  std::string text;     // a scalar's
  std::vector<YamlNode> items;
  std::vector<YamlField> fields;  // in order; no key twice

  // Null if there is none.
  const YamlNode* field(std::string_view key) const;
};

struct YamlField {
  std::string name;
  YamlNode value;
};

// Parses the mapping `text`, UTF-8. The values of the top-level keys in `passed_over` are not read: they
// become empty scalars.
Status parse_block_yaml(std::string_view text, const std::vector<std::string_view>& passed_over,
                        YamlNode* out);

// The rest of the line of top-level key `key`, unparsed; empty where there is none.
std::string_view top_level_line(std::string_view text, std::string_view key);

}  // namespace penstock
