// Times TreeEnsemble::predict over rows in rotation, as the engine calls it (one thread's scratch, reused).
// bench/model/bench.py builds and runs it; prints one JSON object. Arguments: trees.bin, rows (float32,
// row-major), number of rows, batch, rounds, scores (float64 file to write), cpu level (0, 1, 2).
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <vector>

#include "base/cpu.h"
#include "model/tree_ensemble.h"

namespace {

using Clock = std::chrono::steady_clock;
using penstock::CpuLevel;
using penstock::TreeEnsemble;

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "tree_bench: %s\n", what);
  std::exit(1);
}

std::vector<char> read_all(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 8) fail("expected trees rows n batch rounds scores level");
  const std::vector<char> trees = read_all(argv[1]);
  const std::vector<char> bytes = read_all(argv[2]);
  const size_t n = std::strtoull(argv[3], nullptr, 10);
  const size_t batch = std::strtoull(argv[4], nullptr, 10);
  const size_t rounds = std::strtoull(argv[5], nullptr, 10);
  const auto level = static_cast<CpuLevel>(std::atoi(argv[7]));
  if (penstock::force_cpu_level(level) != level) fail("this processor lacks the level");

  std::shared_ptr<const TreeEnsemble> ensemble;
  const auto* data = reinterpret_cast<const uint8_t*>(trees.data());
  if (!TreeEnsemble::load(data, trees.size(), &ensemble).is_ok()) fail("load");
  const size_t width = ensemble->n_features();
  if (batch == 0 || n % batch != 0 || bytes.size() != n * width * sizeof(float)) fail("rows");
  std::vector<float> rows(n * width);
  std::copy_n(bytes.data(), bytes.size(), reinterpret_cast<char*>(rows.data()));

  TreeEnsemble::Scratch scratch(*ensemble);
  std::vector<double> scores(n * ensemble->n_outputs());
  std::printf("{\"us_per_batch\": [");
  for (size_t round = 0; round < rounds; ++round) {
    const auto start = Clock::now();
    for (size_t at = 0; at < n; at += batch) {
      ensemble->predict(rows.data() + at * width, batch, width, scores.data() + at * ensemble->n_outputs(),
                        scratch);
    }
    const double us = std::chrono::duration<double, std::micro>(Clock::now() - start).count();
    std::printf("%s%.4f", round == 0 ? "" : ", ", us * static_cast<double>(batch) / static_cast<double>(n));
  }
  std::printf("]}\n");
  std::ofstream out(argv[6], std::ios::binary);
  out.write(reinterpret_cast<const char*>(scores.data()),
            static_cast<std::streamsize>(scores.size() * sizeof(double)));
  return out ? 0 : 1;
}
