// SPDX-License-Identifier: Apache-2.0
#include "dispatch.h"

#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__linux__) && defined(__aarch64__)
#include <sys/auxv.h>
#endif

namespace wedlm {

namespace portable {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avxvnni {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels kernels;
}
#endif

namespace {

#if defined(__x86_64__)
struct Cpu {
  bool avx2 = false, avxvnni = false, avx512 = false;

  Cpu() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    constexpr unsigned kFma = 1u << 12, kOsxsave = 1u << 27, kF16c = 1u << 29;
    if ((c & (kFma | kOsxsave | kF16c)) != (kFma | kOsxsave | kF16c)) return;
    unsigned low, high;  // which registers the system saves
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    if ((low & 6) != 6 || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    unsigned sub_leaves = a;
    avx2 = b >> 5 & 1;
    constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31, kAll = kF | kDq | kBw | kVl;
    avx512 = avx2 && (low & 0xe0) == 0xe0 && (b & kAll) == kAll && (c >> 11 & 1);
    if (sub_leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avxvnni = avx2 && (a >> 4 & 1);
#ifdef WEDLM_EVEX_VNNI
    avxvnni = avx512;
#endif
  }
};
#elif defined(__aarch64__)
bool has_dot_product() {
#if defined(__linux__)
  constexpr unsigned long kAsimdDp = 1ul << 20;
  return getauxval(AT_HWCAP) & kAsimdDp;
#else
  return true;  // every Apple processor of this architecture has it
#endif
}
#endif

}  // namespace

int paths(const Path** list) {
#if defined(__x86_64__)
  static const Cpu cpu;
  static const Path all[] = {
      {&avx512::kernels, cpu.avx512, "AVX-512 (F, BW, DQ, VL, VNNI)"},
      {&avxvnni::kernels, cpu.avxvnni, "AVX2, FMA, F16C and AVX-VNNI"},
      {&avx2::kernels, cpu.avx2, "AVX2, FMA and F16C"},
      {&portable::kernels, true, "nothing"},
  };
#elif defined(__aarch64__)
  static const Path all[] = {
      {&neon::kernels, has_dot_product(), "the dot product of Armv8.2"},
      {&portable::kernels, true, "nothing"},
  };
#else
  static const Path all[] = {{&portable::kernels, true, "nothing"}};
#endif
  *list = all;
  return static_cast<int>(sizeof all / sizeof all[0]);
}

const Kernels* choose_kernels(const char* name) {
  const Path* list;
  int count = paths(&list);
  for (int i = 0; i < count; i++)
    if (list[i].runs && (!*name || !std::strcmp(name, list[i].kernels->name))) return list[i].kernels;
  return nullptr;
}

}  // namespace wedlm
