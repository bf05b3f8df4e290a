# SPDX-License-Identifier: Apache-2.0
"""An engine's runner that fails."""

import threading
from typing import Any

from wedlm.engine.engine import Engine


class FaultyRunner:
    """Stands in for an engine's runner: its step number ``at`` raises, after half of the work is done."""

    def __init__(
        self, engine: Engine, at: int, hold: threading.Event | None = None, error: type[BaseException] = RuntimeError
    ) -> None:
        self.runner, self.left, self.hold, self.error = engine.runner, at, hold, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def run(self, plan: Any) -> Any:
        if self.hold is not None:
            self.hold.wait(30)
        results = self.runner.run(plan)
        if self.left == 0:
            raise self.error("injected")
        self.left -= 1
        return results
