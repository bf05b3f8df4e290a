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

Pool::Pool(int threads) {
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
  auto job = static_cast<uint32_t>(ticket_.load() >> 32) + 1;
  // Closed first: a thread that is late for the last job must not claim from it by what is written next.
  ticket_ = uint64_t{job - 1} << 32 | 0x7fffffff;
  function_ = function;
  context_ = context;
  done_ = 0;
  pieces_ = pieces;
  ticket_ = uint64_t{job} << 32;
  if (sleeping_ > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  claim(job, 0);
  auto finished = [&] { return done_ == pieces; };
  if (finished() || spin(finished)) return;
  std::unique_lock<std::mutex> lock(mutex_);
  caller_sleeps_ = true;
  finished_.wait(lock, finished);
  caller_sleeps_ = false;
}

void Pool::claim(uint32_t job, int thread) {
  for (;;) {
    int32_t pieces = pieces_;
    Function function = function_;
    const void* context = context_;
    uint64_t ticket = ticket_;
    // What was read above belongs to this job if the ticket still does: the caller changes it only between jobs.
    do {
      if (ticket >> 32 != job || static_cast<int32_t>(ticket) >= pieces) return;
    } while (!ticket_.compare_exchange_weak(ticket, ticket + 1));
    function(context, static_cast<int32_t>(ticket), thread);
    if (++done_ == pieces && caller_sleeps_) {
      std::lock_guard<std::mutex> lock(mutex_);
      finished_.notify_one();
    }
  }
}

void Pool::work(int thread) {
  uint32_t seen = 0;
  auto fresh = [&] { return stop_ || static_cast<uint32_t>(ticket_ >> 32) != seen; };
  for (;;) {
    if (!spin(fresh)) {
      std::unique_lock<std::mutex> lock(mutex_);
      sleeping_++;
      wake_.wait(lock, fresh);
      sleeping_--;
    }
    if (stop_) return;
    seen = static_cast<uint32_t>(ticket_ >> 32);
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
