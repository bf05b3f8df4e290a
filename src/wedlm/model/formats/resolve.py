# SPDX-License-Identifier: Apache-2.0
"""Find the files on this machine for what the user typed: a path, a hub id, or the name of an embedded model."""

import re
from pathlib import Path

from wedlm.model.demo import DEMO_ADAPTER, demo_model_path
from wedlm.model.errors import CheckpointError

# The embedded model adapted to WeDLM, and the AR checkpoint that it was made from: the same file of weights.
DEMO_NAME, DEMO_BASE_NAME = "demo", "demo-base"
DEMO_ADAPTER_NAME = "demo-masked"  # the adapter of masked rows for the latter
_CONFIG_PATTERNS = ["*.json", "*.txt", "*.jinja"]  # templates beside the default are in a folder
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def locate(path_or_id: str | Path, weights: bool = True) -> Path:
    """A checkpoint directory or a ``.gguf`` file.

    "demo" and "demo-base" mean the embedded model (write "./demo" for a directory of that name). An existing path is
    taken as that path. Anything else of the form ``organisation/name`` is fetched from the Hugging Face hub, without
    weights if ``weights`` is False. Only data is fetched, never code or pickles. Raises CheckpointError.
    """
    if path_or_id in (DEMO_NAME, DEMO_BASE_NAME):
        return demo_model_path()
    path = Path(path_or_id).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.is_file():
        raise CheckpointError(f"{path} is a file; expected a checkpoint directory or a .gguf file")
    if not _HUB_ID.fullmatch(str(path_or_id)) or path.suffix in (".gguf", ".safetensors", ".bin", ".pt"):
        raise CheckpointError(
            f"{path_or_id} does not exist; expected a checkpoint directory, a .gguf file, 'demo' or a hub id "
            "(organisation/name)"
        )
    return _from_hub(str(path_or_id), weights)


def locate_adapter(path_or_name: str | Path) -> Path:
    """The directory of an adapter; "demo-masked" means the embedded one (write "./demo-masked" for a directory)."""
    return DEMO_ADAPTER if path_or_name == DEMO_ADAPTER_NAME else Path(path_or_name).expanduser()


def _from_hub(repo_id: str, weights: bool) -> Path:
    # Imported here because it is slow to import and local checkpoints do not need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*_CONFIG_PATTERNS, "*.safetensors"] if weights else _CONFIG_PATTERNS
    try:
        return Path(
            snapshot_download(
                repo_id, allow_patterns=patterns, ignore_patterns=["*/*.json", "*/*.txt", "*/*.safetensors"]
            )
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{repo_id} is not on this machine, and the Hugging Face hub could not be reached; expected a checkpoint "
            "directory, a .gguf file, 'demo' or a network"
        ) from error
    except (
        Exception
    ) as error:  # The hub client and its HTTP library raise many unrelated types; all mean "not fetched".
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{repo_id} is not a local path, and it could not be fetched from the Hugging Face hub: {reason}"
        ) from error
