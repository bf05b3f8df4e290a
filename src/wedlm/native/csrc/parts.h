// SPDX-License-Identifier: Apache-2.0
// Where a forward's time goes. Compiled with -DWEDLM_NATIVE_PARTS=CLOCK_MONOTONIC (or CLOCK_THREAD_CPUTIME_ID, for one
// thread on a busy machine), the library prints each part's time when the process ends.
#pragma once
#ifdef WEDLM_NATIVE_PARTS
#include <time.h>

#include <cstdio>
#include <map>
#include <string>

namespace wedlm {

class Part {
 public:
  explicit Part(const char* name) : name_(name), start_(now()) {}
  ~Part() { totals().ms[name_] += now() - start_; }

 private:
  struct Totals {
    std::map<std::string, double> ms;
    ~Totals() {
      for (const auto& [name, time] : ms) std::fprintf(stderr, "%-20s %10.2f ms\n", name.c_str(), time);
    }
  };
  static Totals& totals() {
    static Totals all;
    return all;
  }
  static double now() {
    timespec time;
    clock_gettime(WEDLM_NATIVE_PARTS, &time);
    return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) * 1e-6;
  }
  const char* name_;
  double start_;
};

}  // namespace wedlm
#else
namespace wedlm {
struct Part {
  explicit Part(const char*) {}
};
}  // namespace wedlm
#endif
