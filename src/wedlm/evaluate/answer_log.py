# SPDX-License-Identifier: Apache-2.0
"""Answers on disk as they come, so that a killed run does not compute them again."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wedlm.model.formats.save import read_whole_lines

Answer = dict[str, Any]


@dataclass
class AnswerLog:
    """Answers of one task in one run, by (document, index of the request in it). ``path`` None keeps them in memory.

    ``origin``: what new answers are computed on; ``origins`` has those of all answers, in the order in which they first
    appear. An entry's ``seconds`` is the wall time since the entry before it, so that they add up over killed runs.
    """

    path: Path | None = None
    origin: Answer = field(default_factory=dict)
    entries: dict[tuple[int, int], Answer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._last = time.perf_counter()
        self.origins: list[Answer] = []
        self._documents: dict[int, list[int]] = {}
        self._named_origin = False
        if self.path is not None and self.path.exists():
            for line in read_whole_lines(self.path):
                self._remember(json.loads(line))

    def start(self) -> None:
        """Start the time of the next entry."""
        self._last = time.perf_counter()

    def find(self, doc_id: int, index: int) -> Answer | None:
        return self.entries.get((doc_id, index))

    def add(self, doc_id: int, index: int, entry: Answer) -> None:
        """Keep an answer; it is on disk when this returns."""
        now = time.perf_counter()
        lines: list[Answer] = [] if self._named_origin else [{"origin": self.origin}]
        self._named_origin = True
        lines.append({"doc_id": doc_id, "index": index, **entry, "seconds": now - self._last})
        self._last = now
        for line in lines:
            self._remember(dict(line))
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))

    def of_document(self, doc_id: int) -> list[Answer]:
        """The answers to a document's requests, in their order."""
        return [self.entries[doc_id, index] for index in sorted(self._documents.get(doc_id, []))]

    def discard(self) -> None:
        """Remove the file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _remember(self, line: Answer) -> None:
        if "origin" in line:
            if line["origin"] not in self.origins:
                self.origins.append(line["origin"])
            return
        place = line.pop("doc_id"), line.pop("index")
        if place not in self.entries:
            self._documents.setdefault(place[0], []).append(place[1])
        self.entries[place] = line
