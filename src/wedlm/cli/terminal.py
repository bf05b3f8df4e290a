# SPDX-License-Identifier: Apache-2.0
"""What the commands share on the terminal: consoles, Ctrl-C, progress, errors as sentences. Does not import torch."""

import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.text import Text

from wedlm.extras import install_extras

out, err = Console(highlight=False), Console(stderr=True, highlight=False)
# One colour per forward, in turn: tokens that became final together look alike.
PALETTE = ("cyan", "yellow", "green", "magenta", "blue", "red")
# What a model writes must not move the cursor or change the terminal's state.
_PARTS = re.compile(r"\n| +|[^\s\u1100-\uffff\U0001f000-\U0003ffff]+|\S|\s")
_CONTROL = {code: None for code in [*range(32), *range(127, 160)] if chr(code) not in "\n\t"}
INTERRUPTED = 130  # the shell's exit code for Ctrl-C: 128 + SIGINT


class Interrupt:
    """Treats Ctrl-C as a request: inside ``with``, the first one sets ``asked``, so that no forward is cut in half and
    the text so far can be kept. A second one raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Interrupt":
        self._previous = signal.getsignal(signal.SIGINT)
        # Whoever ignores or handles SIGINT already (nohup, a host program) keeps doing so.
        self._ours = (
            self._previous is signal.default_int_handler and threading.current_thread() is threading.main_thread()
        )
        if self._ours:
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


def status(text: str) -> Status:
    """Show a line with a spinner inside ``with``. The spinner is slow, because each frame takes time from torch's
    threads."""
    return err.status(text, refresh_per_second=2)


def progress_bar(shown: bool) -> Progress:
    """A bar that shows done of all and the time, for tasks with a description; it disappears when ``with`` ends."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True, disable=not shown)


def note(text: str, style: str = "dim") -> None:
    """Print one line for the user, apart from the text that the command produces."""
    err.print(Text(text, style=style), soft_wrap=True)


def write(text: str, style: str = "") -> None:
    """Write model text to standard output at once: exact bytes to a file or pipe, harmless characters to a terminal."""
    if out.is_terminal:
        text = text.translate(_CONTROL)
    if out.is_terminal and style:
        out.print(Text(text, style=style), end="", soft_wrap=True)
        return
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        error.filename = "standard output"  # a full disk has no name by itself
        raise


class WrappedText:
    """Writes a text as it comes. On a terminal it never breaks a word at the right edge, unless the word is longer than
    a line: a word appears once it is complete, or that long."""

    def __init__(self) -> None:
        self._column = 0  # cells of this line that are written
        self._spaces = ""  # behind them, if another word follows in this line
        self._word: list[tuple[str, str]] = []  # text and style of its parts that are not written
        self._is_long = False  # the beginning of the word is written

    def write(self, text: str, style: str = "") -> None:
        """The next piece of the text."""
        if not out.is_terminal:
            write(text, style)
            return
        for part in _PARTS.findall(text.translate(_CONTROL).replace("\t", "    ")):
            if part == "\n":
                self.end()
                self._column, self._spaces = 0, ""
                write("\n")
            elif part[0] == " ":
                self.end()
                self._spaces += part
            elif cell_len(part[0]) > 1:  # scripts that break a line between any two characters
                self.end()
                self._word.append((part, style))
                self.end()
            else:
                self._word.append((part, style))
                if self._is_long or self._cells > out.width:
                    self._show()
                    self._is_long = True

    def end(self) -> None:
        """Write the word so far, which is complete."""
        self._show()
        self._is_long = False

    @property
    def _cells(self) -> int:
        return sum(cell_len(part) for part, _ in self._word)

    def _show(self) -> None:
        if not self._word:
            return
        cells = len(self._spaces) + self._cells
        if self._column and self._column + cells > out.width and not self._is_long:
            write("\n")
            self._column, cells, self._spaces = 0, cells - len(self._spaces), ""
        write(self._spaces)
        for part, style in self._word:
            write(part, style)
        self._column += cells
        if self._column > out.width:  # the terminal has cut it
            self._column %= out.width
        self._spaces, self._word = "", []


def has_colours() -> bool:
    """Whether standard output is a terminal with colours and the user wants them (NO_COLOR)."""
    return out.color_system is not None and not out.no_color


def by_step(pieces: Iterable[tuple[str, int]]) -> Text:
    """Text coloured by the forward that made it final; without colours, a bar stands between forwards."""
    text, last = Text(), None
    for string, step in pieces:
        if not has_colours():
            text.append("|" if last not in (None, step) else "")
        text.append(string, style=PALETTE[step % len(PALETTE)])
        last = step
    text.rstrip()
    return text


@contextmanager
def plain_errors(debug: bool) -> Iterator[None]:
    """Turn an error that the user can fix into one sentence and exit code 2 (``debug``: a traceback); Ctrl-C exits with
    130.

    Warnings are shown in one line each. Any other exception is our bug and keeps its traceback.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}", "yellow")
        try:
            yield
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            raise  # the reader of our output left: click ends quietly
        except (ValueError, OSError, RuntimeError) as error:
            if debug or not _is_for_user(error):
                raise
            note(f"error: {error}", "red")
            raise typer.Exit(2) from None


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Raises ValueError if the block imports a package of this extra that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("wedlm"):
            raise
        raise ValueError(f"{error.name} is not installed; install it with: {install_extras(name)}") from error


def _is_for_user(error: Exception) -> bool:
    if isinstance(error, ValueError | OSError):
        return True
    from wedlm.model.errors import DemoModelError  # slow: it imports torch

    return isinstance(error, DemoModelError)


def check_text(name: str, text: str) -> None:
    """Raises ValueError for text that contains bytes which were not UTF-8 where they were typed."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} is not valid UTF-8; expected text in that encoding") from None
