# SPDX-License-Identifier: Apache-2.0
"""Read messages from the terminal with editing, multi-line pastes and history. Lines from a pipe are read unchanged."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from wedlm.cli.terminal import note

_MOST = 1000  # messages that the history keeps


def message_reader(keeps_history: bool) -> Callable[[], str]:
    """A function that reads the next message, stripped. It raises EOFError at the end of input. On a terminal Ctrl-C
    empties the line, and on an empty line raises KeyboardInterrupt. A paste is one text, even with several lines."""
    if not sys.stdin.isatty():
        return _read_plain
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
    from prompt_toolkit.output import create_output

    keys = KeyBindings()

    @keys.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @keys.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt())

    path = _history_file() if keeps_history else None
    if path is not None:
        _shorten(path)
    session: PromptSession[str] = PromptSession(
        "> ",
        multiline=True,  # a text may have several lines; Enter sends it all the same
        prompt_continuation="  ",
        key_bindings=keys,
        history=InMemoryHistory() if path is None else FileHistory(path),
        output=create_output(stdout=sys.stderr),
        enable_open_in_editor=False,
    )
    return lambda: session.prompt().strip()


def _read_plain() -> str:
    try:
        return input().strip()
    except KeyboardInterrupt:
        raise EOFError from None


def history_path() -> Path:
    """The file for messages: $XDG_STATE_HOME/wedlm/chat_history, by default in ~/.local/state."""
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local/state") / "wedlm" / "chat_history"


def _history_file() -> Path | None:
    """The file, readable only by its owner; None, with a note to the user, if it cannot be created."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        note(f"Messages are kept for this conversation alone: {path} cannot be written ({error.strerror}).")
        return None
    return path


def _shorten(path: Path) -> None:
    """Keep only the newest messages."""
    from prompt_toolkit.history import FileHistory

    newest_first = list(FileHistory(path).load_history_strings())
    if len(newest_first) > _MOST:
        path.write_bytes(b"")
        history = FileHistory(path)
        for message in reversed(newest_first[:_MOST]):
            history.store_string(message)


@contextmanager
def without_echo() -> Iterator[None]:
    """Hide keys that are typed inside the block; they wait for the next reader. Ctrl-C works as before, and drops what
    was typed before it."""
    try:
        import termios
    except ModuleNotFoundError:  # no such terminals
        yield
        return
    if not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
