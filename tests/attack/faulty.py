# SPDX-License-Identifier: Apache-2.0
"""``wedlm`` with faults: after SIGUSR1 the next forward raises, after SIGUSR2 the next tokenisation.

python -m tests.attack.faulty serve ...
"""

import signal
from typing import Any

from wedlm.cli import main
from wedlm.engine.engine import Engine
from wedlm.model import Tokenizer


def arm(cls: type, name: str, number: signal.Signals) -> None:
    """Let the method raise once after each signal."""
    method, armed = getattr(cls, name), []
    signal.signal(number, lambda *_: armed.append(True))

    def faulty(*args: Any, **options: Any) -> Any:
        if armed:
            armed.clear()
            raise RuntimeError("a fault that a test has injected")
        return method(*args, **options)

    setattr(cls, name, faulty)


if __name__ == "__main__":
    arm(Engine, "step", signal.SIGUSR1)
    arm(Tokenizer, "encode", signal.SIGUSR2)
    main()
