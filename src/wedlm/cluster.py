# SPDX-License-Identifier: Apache-2.0
"""Ray, on one machine or a cluster: how it is joined, and what one copy of a model takes of it. No torch here."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


def join_ray() -> Any:
    """Ray's module, connected: to the cluster that RAY_ADDRESS or ``ray start`` names, or to one on this machine that
    this starts. The nodes of a cluster need this package and the checkpoint under the same name."""
    import ray

    if not ray.is_initialized():
        ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
    return ray


@dataclass(frozen=True)
class Share:
    """What one copy of a model takes: ``num_gpus`` GPUs, or else ``num_cpus`` processors, which are its threads."""

    num_gpus: int
    num_cpus: int

    @property
    def device(self) -> str:
        """The engine's option."""
        return "cuda" if self.num_gpus else "cpu"

    @property
    def needs(self) -> dict[str, Any]:
        """Ray's options of an actor."""
        return {"num_gpus": self.num_gpus, "num_cpus": self.num_cpus}

    def most(self) -> int:
        """How many copies Ray has room for."""
        given, (name, each) = join_ray().cluster_resources(), self._main
        return int(given.get(name, 0) // each)

    def has_room(self) -> bool:
        """Whether Ray has the devices of a copy to spare at this moment."""
        name, each = self._main
        return join_ray().available_resources().get(name, 0) >= each

    def check(self, count: int, option: str) -> None:
        """ValueError if Ray has too few devices for so many copies, which that option asked for."""
        given, (name, each) = join_ray().cluster_resources(), self._main
        if count * each > given.get(name, 0):
            raise ValueError(
                f"{option} is {count}, and each takes {each} {name}; expected at most the "
                f"{given.get(name, 0):g} {name}s that Ray has"
            )

    @property
    def _main(self) -> tuple[str, int]:
        return ("GPU", self.num_gpus) if self.num_gpus else ("CPU", self.num_cpus)


def share_of(device: str, threads: int | None, option: str, num_devices: int = 1) -> Share:
    """What a copy takes on ``device``, the engine's option: GPUs if Ray has some, unless it is cpu. ``num_devices``: of
    one copy. ValueError for a device that a copy cannot choose by itself, beside ``option``."""
    if device not in ("auto", "cuda", "cpu"):
        raise ValueError(f"--device is {device}; expected auto, cuda or cpu with {option}")
    if device != "cpu" and (device != "auto" or join_ray().cluster_resources().get("GPU", 0) > 0):
        return Share(num_gpus=num_devices, num_cpus=0)
    return Share(num_gpus=0, num_cpus=threads or 1)


@contextmanager
def plain_errors() -> Iterator[None]:
    """What an actor raised, as it raised it."""
    from ray.exceptions import RayTaskError

    try:
        yield
    except RayTaskError as error:
        raise error.cause from None
