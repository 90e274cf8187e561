// Reads names of bundle folders from the standard input and prints what each holds, every text in hex: a line
// of "ok NAME VERSION KIND SERVICE inputs NAME:DTYPE... classes LABEL...", or "CODE MESSAGE".
#include <penstock/bundle.h>

#include <cstdio>
#include <iostream>
#include <string>

static std::string hex(const std::string& text) {
  std::string out = "x";
  for (const unsigned char c : text) {
    out += "0123456789abcdef"[c >> 4];
    out += "0123456789abcdef"[c & 15];
  }
  return out;
}

int main() {
  for (std::string folder; std::getline(std::cin, folder);) {
    penstock::Bundle bundle;
    if (const auto status = penstock::Bundle::load(folder, &bundle); !status.is_ok()) {
      std::printf("%s %s\n", penstock::code_name(status.code), status.message.c_str());
      continue;
    }
    std::string line = "ok " + hex(bundle.name()) + " " + hex(bundle.version()) + " " +
                       hex(bundle.output_kind()) + " " + hex(bundle.service()) + " inputs";
    for (const auto& input : bundle.inputs()) line += " " + hex(input.name) + ":" + hex(input.dtype);
    line += " classes";
    for (const auto& label : bundle.classes()) line += " " + hex(label);
    std::puts(line.c_str());
  }
}
