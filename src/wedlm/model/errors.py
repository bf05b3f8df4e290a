# SPDX-License-Identifier: Apache-2.0
"""The errors of loading a model."""

from collections.abc import Iterator
from contextlib import contextmanager

_MAX_MESSAGE = 600


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read or matched to its config; the message is one sentence for the user.

    The message may quote a file, so control characters are escaped and the middle of a long one is left out.
    """

    def __init__(self, message: str) -> None:
        shown = "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in message)
        if len(shown) > _MAX_MESSAGE:
            shown = f"{shown[: _MAX_MESSAGE // 2]} … {shown[-_MAX_MESSAGE // 2 :]}"
        super().__init__(shown)


class DemoModelError(RuntimeError):
    """The demo model could not be obtained; the message says what was tried and how to get it by hand."""


@contextmanager
def reading(origin: object) -> Iterator[None]:
    """Turn whatever a foreign file makes its reader raise into a CheckpointError that names ``origin``.

    A ValueError's own sentence is kept, and OSError passes; anything else is a malformed file that we did not think of.
    """
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{origin}: {error}") from error
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(f"{origin} is malformed ({type(error).__name__}: {error})") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise CheckpointError(f"{origin} makes the tokenizers library fail: {error}") from error


def is_panic(error: BaseException) -> bool:
    """Whether a Rust library failed. Its exception is not an Exception and has no name that could be imported."""
    return type(error).__name__ == "PanicException"
