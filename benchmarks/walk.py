# SPDX-License-Identifier: Apache-2.0
"""The way of one step through the engine: which modules run, and how often a module that was left is entered again.

    python benchmarks/walk.py            # this tree
    python benchmarks/walk.py ../before  # another checkout, whose sources lie in TREE/src or in TREE

A verified step of a tiny random model on the CPU, traced from ``Engine.step``. Calls within one module do not count.
The model's own layers count as one module, because what they do is the same in every tree. Last line: JSON.
"""

import importlib
import json
import sys
from pathlib import Path
from types import FrameType
from typing import Any

TREE = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])
SOURCES = TREE / "src" if (TREE / "src" / "wedlm").is_dir() else TREE
INNER = ("model", "attention", "kernels")  # one room: a forward


def tiny_engine() -> Any:
    """An engine around random weights, by whichever names the tree has."""
    sys.path.insert(0, str(SOURCES.resolve()))
    import torch

    shapes = importlib.import_module("wedlm.bench.shapes")
    config = shapes.shape_config("tiny")
    model = shapes.random_model(config, torch.device("cpu"), torch.float32, None)
    facts = (config.vocab_size, shapes.MASK_TOKEN_ID, config.eos_token_ids, config.max_length)
    if (SOURCES / "wedlm" / "engine" / "build.py").exists():  # before the redesign
        build = importlib.import_module("wedlm.engine.build").build_engine
        engine = importlib.import_module("wedlm.engine.engine")
        return build(model, engine.EngineConfig(*facts), None, kv_cache_bytes=2**24)
    options = importlib.import_module("wedlm.engine.options")
    plan = importlib.import_module("wedlm.engine.factory").plan_engine
    chosen = options.EngineOptions(kv_cache_bytes=2**24)
    return plan(model, options.EngineConfig(*facts, chosen), None).build()


def trace(work: Any) -> list[str]:
    """The modules of the package in which ``work`` is, in order, each named once for as long as it stays there."""
    rooms: list[str] = []

    def room_of(frame: FrameType) -> str | None:
        path = Path(frame.f_code.co_filename)
        if "wedlm" not in path.parts or frame.f_code.co_name in ("__init__", "<genexpr>", "<listcomp>", "<lambda>"):
            return None
        name = ".".join(path.with_suffix("").parts[path.parts.index("wedlm") + 1 :])
        return "forward" if name.split(".")[0] in INNER else name

    def enter(frame: FrameType | None) -> None:
        while frame is not None and room_of(frame) is None:
            frame = frame.f_back
        room = None if frame is None else room_of(frame)
        if room is not None and (not rooms or rooms[-1] != room):
            rooms.append(room)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and room_of(frame) is not None:
            enter(frame)
        elif event == "return" and room_of(frame) is not None:
            enter(frame.f_back)

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return rooms


def main() -> None:
    engine = tiny_engine()
    params = importlib.import_module("wedlm.engine.sampling_params").SamplingParams
    engine.add("a", list(range(3, 40)), params(decoding="verified", max_tokens=100, ignore_eos=True))
    for _ in range(5):  # the prompt, and what is done once
        engine.step()
    rooms = trace(engine.step)
    first = rooms.index(next(room for room in rooms if "runner" in room))
    last = len(rooms) - 1 - rooms[::-1].index(next(room for room in rooms[::-1] if "runner" in room))
    report = {"step": figures(rooms), "within the runner": figures(rooms[first : last + 1])}
    print(" -> ".join(rooms))
    print(json.dumps(report))


def figures(rooms: list[str]) -> dict[str, int]:
    """Stays, distinct modules, and returns to one that was left."""
    return {"stays": len(rooms), "modules": len(set(rooms)), "returns": len(rooms) - len(set(rooms))}


if __name__ == "__main__":
    main()
