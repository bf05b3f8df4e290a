// SPDX-License-Identifier: Apache-2.0
// Threads that share the pieces of one loop, and sleep when there is none.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace wedlm {

// Each thread has a range of the pieces, the same from step to step, and takes from others' ranges when its own is done.
// The caller takes part: a thread that the system has set aside delays no piece but the one it holds. Waiting spins for
// some microseconds, then sleeps. Not for two callers at once.
class Pool {
 public:
  explicit Pool(int threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls body(piece, thread) for each piece in 0..pieces - 1, thread in 0..threads() - 1, and returns when all are done.
  template <class Body>
  void run(int32_t pieces, const Body& body) {
    run(pieces, [](const void* context, int32_t piece, int thread) { (*static_cast<const Body*>(context))(piece, thread); },
        &body);
  }

 private:
  using Function = void (*)(const void* context, int32_t piece, int thread);

  struct alignas(128) Range {  // on a cache line of its own
    // Number of the job in the upper half, next piece to claim in the lower: a late thread cannot claim from a newer job.
    std::atomic<uint64_t> ticket{0};
    std::atomic<int32_t> end{0};
  };

  void run(int32_t pieces, Function function, const void* context);
  void work(int thread);
  void claim(uint32_t job, int thread);

  std::unique_ptr<Range[]> ranges_;
  std::atomic<uint32_t> job_{0};
  std::atomic<Function> function_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int> sleeping_{0};
  std::atomic<bool> caller_sleeps_{false}, stop_{false};
  alignas(128) std::atomic<int32_t> left_{0};  // pieces that are not done
  std::mutex mutex_;
  std::condition_variable wake_, finished_;
  std::vector<std::thread> workers_;
};

// Cores that this process may use, hyper-threads of one core counted once.
int physical_cores();

}  // namespace wedlm
