// Writers of a shared arena that are killed (SIGKILL) at random moments, beside one that lives on.
//
// Processes: this one reads all the time and takes over after each kill; "the survivor" writes the even keys
// to the end; a victim a round writes the odd keys until it is killed. Each key has one writer at a time and
// rising stamps, each row is a function of (key, stamp). A hit must be whole, no older than the last put that
// ended before the read began, no newer than the last begun before it ended. After a takeover the survivor
// must go on (no lock is lost) and the arena must fill to its capacity again (no slot is lost). Argument:
// rounds.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "cache/feature_cache.h"
#include "check.h"

namespace {

using penstock::FeatureCache;
using penstock::FeatureCacheConfig;
using penstock::Key128;
using penstock::ReadStatus;
using penstock::RowMeta;

constexpr uint32_t kWords = 120;  // most of a put is the copy of its row, so most kills find a lock held
constexpr uint64_t kKeys = 64;
constexpr FeatureCacheConfig kConfig{.capacity = 45, .row_words = kWords, .ttl_ns = 0, .identity = 0x5eed};
constexpr uint32_t kReaderOwner = 1, kSurvivorOwner = 2, kFirstVictim = 10;

// What the processes tell each other; sequentially consistent throughout.
struct Board {
  std::array<std::atomic<uint64_t>, kKeys> begun, ended;
  std::atomic<uint64_t> next_stamp{1};
  std::atomic<uint64_t> survivor_puts{0}, victim_puts{0};
  std::atomic<bool> stop{false};
};

Key128 key_of(uint64_t k) {
  return {k * 0x9e3779b97f4a7c15U, k};
}
uint64_t word_of(uint64_t k, uint64_t stamp, uint64_t i) {
  return (k << 48) ^ (stamp << 12) ^ (i * 0x10001);
}
uint64_t next_random(uint64_t& state) {
  state = state * 6364136223846793005U + 1442695040888963407U;
  return state >> 33;
}

void put_row(FeatureCache& cache, uint64_t k, uint64_t stamp, uint32_t owner) {
  std::array<uint64_t, kWords> row;
  for (uint64_t i = 0; i < kWords; ++i) row[i] = word_of(k, stamp, i);
  const auto s = static_cast<int64_t>(stamp);
  cache.put(key_of(k), row.data(), RowMeta{0, 1000, s, static_cast<int64_t>(k)}, stamp, 0, owner);
}

// A child's whole life: it maps the arena anew, at whatever address.
[[noreturn]] void write_for_ever(int fd, Board& board, uint64_t parity, uint32_t owner,
                                 std::atomic<uint64_t>& puts) {
  std::unique_ptr<FeatureCache> cache;
  CHECK(FeatureCache::attach(fd, &kConfig, &cache).is_ok());
  uint64_t random = owner;
  while (!board.stop.load()) {
    const uint64_t k = next_random(random) % (kKeys / 2) * 2 + parity;
    const uint64_t stamp = board.next_stamp.fetch_add(1);
    board.begun[k].store(stamp);
    if (next_random(random) % 8 == 0) {
      cache->discard(key_of(k), stamp, owner);
    } else {
      put_row(*cache, k, stamp, owner);
    }
    board.ended[k].store(stamp);
    puts.fetch_add(1);
  }
  _exit(0);
}

pid_t start_writer(int fd, Board& board, uint64_t parity, uint32_t owner, std::atomic<uint64_t>& puts) {
  const pid_t pid = fork();
  CHECK(pid >= 0);
  if (pid == 0) write_for_ever(fd, board, parity, owner, puts);
  return pid;
}

struct Reader {
  FeatureCache& cache;
  Board& board;
  std::vector<uint64_t> rows = std::vector<uint64_t>(kKeys * kWords);
  uint64_t hits = 0;

  void read_all() {
    std::array<Key128, kKeys> keys;
    std::array<uint64_t, kKeys> floor;
    std::array<ReadStatus, kKeys> status;
    std::array<RowMeta, kKeys> meta;
    for (uint64_t k = 0; k < kKeys; ++k) keys[k] = key_of(k);
    for (uint64_t k = 0; k < kKeys; ++k) floor[k] = board.ended[k].load();
    hits += cache.get_many(keys.data(), kKeys, 5, 5, rows.data(), status.data(), meta.data(), nullptr);
    for (uint64_t k = 0; k < kKeys; ++k) {
      if (status[k] != ReadStatus::kHit) continue;
      const auto stamp = static_cast<uint64_t>(meta[k].event_time);
      CHECK(meta[k].known_at == static_cast<int64_t>(k));
      for (uint64_t i = 0; i < kWords; ++i) CHECK(rows[k * kWords + i] == word_of(k, stamp, i));
      CHECK(stamp >= floor[k]);
      CHECK(stamp <= board.begun[k].load());
    }
  }

  // Reads until `count` has passed `past`; a writer that hangs fails here.
  void read_until_past(const std::atomic<uint64_t>& count, uint64_t past) {
    const auto limit = std::chrono::steady_clock::now() + std::chrono::seconds(60);
    while (count.load() <= past) {
      read_all();
      CHECK(std::chrono::steady_clock::now() < limit);
    }
  }
};

// Every slot takes a row: with nobody else writing, enough keys fill each bucket.
void check_fills(FeatureCache& cache, Board& board) {
  cache.clear(kReaderOwner);
  CHECK(cache.stats().size == 0);
  for (uint64_t k = kKeys; k < kKeys + 20 * kConfig.capacity; ++k)
    put_row(cache, k, board.next_stamp.fetch_add(1), kReaderOwner);
  CHECK(cache.stats().size == cache.stats().capacity);
  cache.clear(kReaderOwner);
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 60;
  const int fd = memfd_create("arena", MFD_CLOEXEC);
  CHECK(fd >= 0);
  std::unique_ptr<FeatureCache> cache;
  CHECK(FeatureCache::create_in(fd, kConfig, &cache).is_ok());
  void* at = mmap(nullptr, sizeof(Board), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(at != MAP_FAILED);
  auto& board = *new (at) Board();
  Reader reader{*cache, board};

  const pid_t survivor = start_writer(fd, board, 0, kSurvivorOwner, board.survivor_puts);
  uint64_t random = 99;
  size_t taken = 0;
  // On a crowded machine a writer may lose its turn only where it holds no lock: then more of them must die.
  for (int round = 0; round < rounds || (taken == 0 && round < 20 * rounds); ++round) {
    const uint32_t owner = kFirstVictim + static_cast<uint32_t>(round);
    const uint64_t before = board.victim_puts.load();
    const pid_t victim = start_writer(fd, board, 1, owner, board.victim_puts);
    reader.read_until_past(board.victim_puts, before + next_random(random) % 50);
    CHECK(kill(victim, SIGKILL) == 0);
    int status = 0;
    CHECK(waitpid(victim, &status, 0) == victim);
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);
    reader.read_all();  // nobody has taken over yet: reads end all the same
    taken += cache->reclaim_owner(owner, kReaderOwner);
    CHECK(cache->reclaim_owner(owner, kReaderOwner) == 0);
    reader.read_until_past(board.survivor_puts, board.survivor_puts.load() + 100);
  }
  board.stop.store(true);
  int status = 0;
  CHECK(waitpid(survivor, &status, 0) == survivor);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  CHECK(taken > 0);
  CHECK(cache->stats().lock_takeovers == taken);
  CHECK(reader.hits > 0);
  check_fills(*cache, board);
  std::printf("%d kills, %zu locks taken over, %llu hits checked\n", rounds, taken,
              static_cast<unsigned long long>(reader.hits));
  return 0;
}
