// predict BUNDLE [ROWS]: the scores of float32 rows, from file ROWS or from the standard input.
#include <penstock/bundle.h>
#include <penstock/engine.h>

#include <cstdio>
#include <memory>
#include <vector>

static int fail(const penstock::Status& status) {
  std::fprintf(stderr, "%s: %s\n", penstock::code_name(status.code), status.message.c_str());
  return 1;
}

int main(int argc, char** argv) {
  if (argc < 2) return fail(penstock::Status::invalid("usage: predict BUNDLE [ROWS]"));
  penstock::Bundle bundle;
  if (auto status = penstock::Bundle::load(argv[1], &bundle); !status.is_ok()) return fail(status);
  std::unique_ptr<penstock::Engine> engine;
  if (auto status = penstock::Engine::create(&engine); !status.is_ok()) return fail(status);
  if (auto status = engine->serve(bundle); !status.is_ok()) return fail(status);

  std::FILE* file = argc > 2 ? std::fopen(argv[2], "rb") : stdin;
  if (file == nullptr) return fail(penstock::Status::not_found(std::string(argv[2]) + " cannot be opened"));
  std::vector<float> rows;
  for (float value; std::fread(&value, sizeof value, 1, file) == 1;) rows.push_back(value);
  const size_t n = rows.size() / bundle.n_inputs();
  std::vector<double> scores(n * bundle.n_outputs());
  if (auto status = engine->predict(bundle.name(), rows, n, scores); !status.is_ok()) return fail(status);
  for (size_t i = 0; i < scores.size(); ++i)
    std::printf("%.17g%c", scores[i], (i + 1) % bundle.n_outputs() == 0 ? '\n' : ' ');
}
