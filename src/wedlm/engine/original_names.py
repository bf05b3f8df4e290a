# SPDX-License-Identifier: Apache-2.0
"""The names that the original WeDLM implementation uses, so that code written for it runs (docs/original.md).

A name with a meaning here is mapped, one that cannot change an answer is accepted, and any other is refused with what
to use instead. Does not import torch, because the command line reads ``options.py``.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

# Methods of its LLM that have none here.
METHODS = {
    "add_request": "generate takes many prompts at once, and AsyncEngine takes them while others run",
    "step": "generate and generate_stream run the steps, and AsyncEngine does in a thread of its own",
    "is_finished": "generate returns when all are finished",
}


def translated(given: Mapping[str, Any]) -> dict[str, Any]:
    """Translate options of the original's ``LLM`` to fields of ``EngineOptions``. Raises ValueError naming an option
    that asks for what does not exist here."""
    ours = dict(given)
    ours.pop("nccl_port", None)  # ranks meet in a directory of their own: no port is fixed
    eager = ours.pop("enforce_eager", False)
    if not isinstance(eager, bool):
        raise ValueError(f"enforce_eager is {eager!r}; expected True or False")
    if eager and ours.setdefault("cuda_graphs", False) is not False:
        raise ValueError(f"enforce_eager is True and cuda_graphs is {ours['cuda_graphs']!r}; expected one of them")
    if "kvcache_block_size" in ours:
        size = ours.pop("kvcache_block_size")
        if "page_size" in ours:
            raise ValueError("kvcache_block_size is set and so is page_size, its name here; expected one of them")
        ours["page_size"] = size
    blocks = ours.pop("num_kvcache_blocks", -1)
    if isinstance(blocks, bool) or blocks != -1:
        raise ValueError(f"num_kvcache_blocks is {blocks!r}; expected -1: kv_cache_bytes is the cache's size")
    config = ours.pop("hf_config", None)
    if config is not None:
        raise ValueError(f"hf_config is {config!r:.80}; expected none: the checkpoint's config.json is read")
    return ours


class ByName:
    """Lets a dataclass with slots be read by name in brackets, also under the original's names."""

    __slots__ = ()
    also: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    def __getitem__(self, name: str) -> Any:
        if name in type(self).__slots__:
            return getattr(self, name)
        if name not in self.also:
            raise KeyError(name)
        return self.also[name](self)

    def __contains__(self, name: object) -> bool:
        return self.get(name, _ABSENT) is not _ABSENT  # type: ignore[arg-type]

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or ``default`` if there is none of this name."""
        try:
            return self[name]
        except KeyError:
            return default


_ABSENT = object()
