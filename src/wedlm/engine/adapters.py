# SPDX-License-Identifier: Apache-2.0
"""The adapters that an engine has by name: which exist, in which slot of the model, and when a slot is free again.

An unloaded adapter loses its name, but the requests that use it keep it; its slot is free after the last one.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # the server's process that parses bodies imports this file, and must not load torch
    from wedlm.model.lora.row_factors import RowFactors

_MAX_NAME = 256


class FactorSlots(Protocol):
    """A model with room for the factors of adapters, in slots from 1 on: ``AdapterBank``, ``NativeAdapters``."""

    def prepare(self, factors: "RowFactors") -> "RowFactors":
        """Do the slow work on the factors, in any thread, so that no step waits for it."""
        ...

    def put(self, slot: int, factors: "RowFactors") -> None:
        """Put an adapter into a free slot. Raises ValueError, with nothing changed, if memory runs out."""
        ...

    def drop(self, slot: int) -> None:
        """Free a slot."""
        ...


class UnknownAdapter(ValueError):
    """No adapter of that name is loaded."""


@dataclass(frozen=True, slots=True, eq=False)
class LoadedAdapter:
    """An adapter that was loaded. ``serial`` distinguishes it from all loaded before. ``changes_keys``: it changes keys
    and values of committed tokens. ``has_masked_rows``: it predicts in masked rows, and was trained in blocks of
    ``block_size``."""

    name: str
    slot: int
    serial: int
    changes_keys: bool
    has_masked_rows: bool
    block_size: int | None

    @property
    def key_root(self) -> int:
        """Where the digest of pages starts, besides the tokens: 0 if the keys are the model's own."""
        return self.serial if self.changes_keys else 0


def slot_of(adapter: LoadedAdapter | None) -> int:
    """The adapter's slot; 0 for no adapter."""
    return 0 if adapter is None else adapter.slot


def key_root_of(adapter: LoadedAdapter | None) -> int:
    """The adapter's ``key_root``; 0 if the keys are the model's own."""
    return 0 if adapter is None else adapter.key_root


class Adapters:
    """At most ``max_adapters`` adapters, including unloaded ones that are still in use. ``slots`` None: the model takes
    none."""

    def __init__(self, slots: FactorSlots | None, max_adapters: int, max_rank: int) -> None:
        self._slots, self.max_adapters, self.max_rank = slots, max_adapters, max_rank
        self._free = list(range(max_adapters, 0, -1))
        self._named: dict[str, LoadedAdapter] = {}
        self._unloaded: list[LoadedAdapter] = []  # in use
        self._serial = 0

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they were loaded."""
        return list(self._named)

    def get(self, name: str) -> LoadedAdapter:
        """The adapter of that name. Raises UnknownAdapter."""
        if name not in self._named:
            known = f"expected one of {', '.join(self._named)}" if self._named else "none is loaded"
            raise UnknownAdapter(f"adapter is {name[:80]!r}; {known}")
        return self._named[name]

    def holds(self, adapter: LoadedAdapter) -> bool:
        """Whether the adapter's factors are still loaded."""
        return self._named.get(adapter.name) is adapter or adapter in self._unloaded

    def check(self, name: str) -> None:
        """Raises ValueError unless an adapter of that name could be loaded now."""
        if not name or len(name) > _MAX_NAME or not name.isprintable():
            raise ValueError(f"the adapter's name is {name[:80]!r}; expected 1 to {_MAX_NAME} printable characters")
        if name in self._named:
            raise ValueError(
                f"an adapter is called {name!r} already; expected another name, or that one unloaded first"
            )
        if self._slots is None:
            raise ValueError("this model takes no adapters by name")
        if not self._free:
            ending = f", {len(self._unloaded)} of them unloaded and in use" if self._unloaded else ""
            raise ValueError(
                f"{self.max_adapters - len(self._free)} adapters are loaded{ending}; expected fewer than "
                f"{self.max_adapters} (max_adapters)"
            )

    def prepare(self, factors: "RowFactors") -> "RowFactors":
        """Prepare what ``load`` takes without making steps wait; call it in any thread."""
        return factors if self._slots is None else self._slots.prepare(factors)

    def load(self, name: str, factors: "RowFactors") -> LoadedAdapter:
        """Load an adapter. Raises ValueError, with nothing changed, if that is impossible."""
        self.check(name)
        if factors.rank > self.max_rank:
            raise ValueError(f"the adapter's rank is {factors.rank}; expected at most {self.max_rank}")
        assert self._slots is not None
        slot = self._free[-1]
        self._slots.put(slot, factors)
        self._free.pop()
        self._serial += 1
        self._named[name] = LoadedAdapter(
            name, slot, self._serial, bool(factors.every), factors.has_masked_rows, factors.block_size
        )
        return self._named[name]

    def unload(self, name: str, in_use: Collection[LoadedAdapter]) -> None:
        """Remove the name, and free the slot unless requests use the adapter. Raises UnknownAdapter."""
        self._unloaded.append(self.get(name))
        del self._named[name]
        self.sweep(in_use)

    def sweep(self, in_use: Collection[LoadedAdapter]) -> None:
        """Free the slots of unloaded adapters that no request uses any more."""
        for adapter in [one for one in self._unloaded if one not in in_use]:
            assert self._slots is not None
            self._slots.drop(adapter.slot)
            self._unloaded.remove(adapter)
            self._free.append(adapter.slot)

    @property
    def any_unloaded(self) -> bool:
        """Whether ``sweep`` may have something to do."""
        return bool(self._unloaded)

    def check_integrity(self, in_use: Collection[LoadedAdapter]) -> None:
        """Raises AssertionError unless each slot is free or belongs to one adapter, and every adapter kept is
        in use."""
        kept = [*self._named.values(), *self._unloaded]
        assert sorted([*self._free, *(one.slot for one in kept)]) == list(range(1, self.max_adapters + 1))
        assert all(one in in_use for one in self._unloaded), "an unloaded adapter is kept that nothing uses"
        assert all(one in kept for one in in_use), "a request has an adapter that is gone"
