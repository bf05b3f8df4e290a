# SPDX-License-Identifier: Apache-2.0
"""Builds the native CPU forward (docs/native.md), where there is a C++ compiler; all else is in pyproject.toml."""

import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/wedlm/native/csrc")
FLAGS = ["-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-pthread"]
# Flags of the units that are for one instruction set; which of them runs is decided at run time.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl", "vnni")]
UNIT_FLAGS = {
    "x86_64": {
        "kernels_avx2.cpp": AVX2,
        "kernels_avxvnni.cpp": [*AVX2, "-mavxvnni"],
        "kernels_avx512.cpp": [*AVX2, *AVX512],
    },
    "aarch64": {"kernels_neon.cpp": ["-march=armv8.2-a+dotprod"]},
}
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())


class BuildNative(build_ext):
    """One library of several units with flags of their own. Without a compiler the installation goes on."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._build(ext)
        except Exception as error:  # whatever a compiler can fail with
            if os.environ.get("WEDLM_REQUIRE_NATIVE") == "1":
                raise
            missing = "a C++17 compiler (g++ or clang++)"
            print(
                f"wedlm: the native CPU forward was not built, for want of {missing}; everything works on torch, and "
                f"a step on a CPU takes several times as long ({error})",
                file=sys.stderr,
            )

    def _build(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(f"the compiler is {self.compiler.compiler_type}; expected g++ or clang++")
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "clang++", "c++")), None)
        if compiler is None:
            raise RuntimeError("there is no g++, clang++ or c++ on PATH")
        self.compiler.set_executable("compiler_so_cxx", [*compiler.split(), "-fPIC"])
        self.compiler.set_executable("compiler_so", [*compiler.split(), "-fPIC"])
        shared = ["-dynamiclib"] if sys.platform == "darwin" else ["-shared"]
        extra = os.environ.get("WEDLM_NATIVE_CXXFLAGS", "").split()
        objects = []
        for source in ext.sources:
            own = UNIT_FLAGS.get(MACHINE, {}).get(Path(source).name, [])
            objects += self.compiler.compile([source], self.build_temp, extra_postargs=[*FLAGS, *own, *extra])
        target = self.get_ext_fullpath(ext.name)
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*compiler.split(), *shared, "-pthread", *extra, *objects, "-o", target])


sources = sorted(str(path) for path in SOURCES.glob("*.cpp"))
headers = sorted(str(path) for path in SOURCES.glob("*.h"))
setup(
    ext_modules=[Extension("wedlm.native._library", sources, depends=headers)],
    cmdclass={"build_ext": BuildNative},
)
