// SPDX-License-Identifier: Apache-2.0
#include "pool.h"

#include <chrono>

#if defined(__linux__)
#include <sched.h>

#include <cstdio>
#include <set>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace wedlm {

namespace {

// Long enough for the gaps between the loops of a step, too short to be seen by another process.
constexpr std::chrono::microseconds kSpin{30};
constexpr uint32_t kClosed = 0x7fffffff;  // a ticket's next piece while its range is being set

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Whether `ready` became true within the time to spin.
template <class Ready>
bool spin(const Ready& ready) {
  auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 32; i++) {
      if (ready()) return true;
      pause();
    }
  } while (std::chrono::steady_clock::now() < until);
  return false;
}

}  // namespace

Pool::Pool(int threads) : ranges_(new Range[static_cast<size_t>(threads)]) {
  for (int thread = 1; thread < threads; thread++) workers_.emplace_back([this, thread] { work(thread); });
}

Pool::~Pool() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  for (auto& worker : workers_) worker.join();
}

void Pool::run(int32_t pieces, Function function, const void* context) {
  if (pieces <= 0) return;
  if (pieces == 1 || workers_.empty()) {
    for (int32_t piece = 0; piece < pieces; piece++) function(context, piece, 0);
    return;
  }
  // All pieces of the job before are done, so its tickets are used up: a thread that is late claims none of this job's
  // until its ticket says so, and by then everything else is written.
  uint32_t job = job_ + 1;
  function_ = function;
  context_ = context;
  left_ = pieces;
  for (int thread = 0; thread < threads(); thread++) {
    Range& range = ranges_[static_cast<size_t>(thread)];
    auto bound = [&](int64_t part) { return static_cast<uint32_t>(pieces * part / threads()); };
    range.ticket.store(uint64_t{job} << 32 | kClosed, std::memory_order_release);
    range.end.store(static_cast<int32_t>(bound(thread + 1)), std::memory_order_release);
    range.ticket.store(uint64_t{job} << 32 | bound(thread), std::memory_order_release);
  }
  job_ = job;
  if (sleeping_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  claim(job, 0);
  auto finished = [&] { return left_ == 0; };
  if (finished() || spin(finished)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_sleeps_ = true;
  finished_.wait(lock, finished);
  caller_sleeps_ = false;
}

void Pool::claim(uint32_t job, int thread) {
  int32_t done = 0;
  for (int i = 0; i < threads(); i++) {
    Range& range = ranges_[static_cast<size_t>((thread + i) % threads())];
    for (;;) {
      uint64_t ticket = range.ticket;
      int32_t end = range.end;
      Function function = function_;
      const void* context = context_;
      auto piece = static_cast<uint32_t>(ticket);
      if (ticket >> 32 != job || piece >= static_cast<uint32_t>(end)) break;
      // What was read belongs to this job if the ticket still does: the caller changes it only between jobs.
      if (!range.ticket.compare_exchange_weak(ticket, ticket + 1)) continue;
      function(context, static_cast<int32_t>(piece), thread);
      done++;
    }
  }
  if (done && (left_ -= done) == 0 && caller_sleeps_) {
    std::lock_guard<std::mutex> lock(mutex_);
    finished_.notify_one();
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  auto fresh = [&] { return stop_ || job_ != seen; };
  for (;;) {
    if (!spin(fresh)) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_++;
      wake_.wait(lock, fresh);
      sleeping_--;
    }
    if (stop_) return;
    seen = job_;
    claim(seen, thread);
  }
}

int physical_cores() {
#if defined(__linux__)
  cpu_set_t allowed;
  CPU_ZERO(&allowed);
  if (sched_getaffinity(0, sizeof allowed, &allowed) == 0) {
    std::set<int> cores;  // the lowest thread of each core
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
      if (!CPU_ISSET(cpu, &allowed)) continue;
      char path[96];
      std::snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
      int lowest = cpu;
      if (std::FILE* file = std::fopen(path, "r")) {
        if (std::fscanf(file, "%d", &lowest) != 1) lowest = cpu;
        std::fclose(file);
      }
      cores.insert(lowest);
    }
    if (!cores.empty()) return static_cast<int>(cores.size());
  }
#endif
  unsigned count = std::thread::hardware_concurrency();
  return count ? static_cast<int>(count) : 1;
}

}  // namespace wedlm
