// SPDX-License-Identifier: Apache-2.0
// Which instruction set runs.
#pragma once
#include "kernels.h"

namespace wedlm {

struct Path {
  const Kernels* kernels;
  bool runs;           // on this processor
  const char* needs;   // what it asks of a processor
};

// All paths compiled in, the fastest first, the portable one last. Returns how many.
int paths(const Path** list);

// The path of that name, or for an empty name the first that runs; null if there is none of that name or it cannot run.
const Kernels* choose_kernels(const char* name);

}  // namespace wedlm
