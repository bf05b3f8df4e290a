# SPDX-License-Identifier: Apache-2.0
"""What a killed process was writing goes with the next one that writes there, and no other process's does."""

import errno
import fcntl
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from wedlm.model.formats.save import write_whole
from wedlm.model.formats.temporary import temporary_folder

_KILLED = """
import os, sys
from pathlib import Path
from wedlm.model.formats.save import write_whole
with write_whole(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    killed = subprocess.run([sys.executable, "-c", _KILLED, str(tmp_path / "a.json")], check=False)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 1, "the kill came while it wrote"
    with write_whole(tmp_path / "b.json") as temporary:
        temporary.write_text("whole")
    assert names(tmp_path) == ["b.json"]


def test_what_another_writes_stays(tmp_path):
    with write_whole(tmp_path / "a.json") as first:
        first.write_text("first")
        with write_whole(tmp_path / "a.json") as second:
            second.write_text("second")
        assert first.read_text() == "first"
    assert (tmp_path / "a.json").read_text() == "first"
    assert names(tmp_path) == ["a.json"]


def test_writers_at_the_same_time(tmp_path):
    """Each removes what it takes for left over; none may lose its own, not even just after making it."""
    failed = []

    def write(number: int) -> None:
        try:
            for turn in range(40):
                with write_whole(tmp_path / f"{turn % 3}.txt") as temporary:
                    temporary.write_text(str(number) * 1000)
        except OSError as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert names(tmp_path) == ["0.txt", "1.txt", "2.txt"]
    assert all(len(set(path.read_text())) == 1 for path in tmp_path.iterdir())


def test_no_other_user_can_enter_it(tmp_path):
    """In a folder that all may write to, such as /tmp, another user could put a link in the place of what is written."""
    tmp_path.chmod(0o1777)
    with temporary_folder(tmp_path) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_where_an_open_file_keeps_a_name(tmp_path, monkeypatch):
    """As NFS does: a file that is removed while it is open stays in its folder until it is closed."""
    remove, close = shutil.rmtree, os.close

    def rename(folder, **_):
        (folder / ".wedlm-lock").rename(tmp_path / "lock")
        remove(folder)
        folder.mkdir()
        (tmp_path / "lock").rename(folder / ".nfs1")

    def unlink(file):
        close(file)
        for path in tmp_path.glob("*/.nfs1"):
            path.unlink()

    monkeypatch.setattr(shutil, "rmtree", rename)
    monkeypatch.setattr(os, "close", unlink)
    with temporary_folder(tmp_path) as folder:
        (folder / "file").write_text("")
    monkeypatch.undo()
    assert names(tmp_path) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
        assert first.is_dir()
        assert second.is_dir()
    assert names(tmp_path) == []


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").write_text("")
    (tmp_path / ".wedlm-writing-link").symlink_to(tmp_path / "other")
    with temporary_folder(tmp_path):
        assert names(tmp_path / "other") == ["kept"]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    trap = tmp_path / ".wedlm-writing-trap"
    trap.mkdir()
    (trap / ".wedlm-lock").symlink_to(tmp_path / "made")
    with temporary_folder(tmp_path):
        assert not (tmp_path / "made").exists()


def test_where_nothing_can_be_written_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), temporary_folder(tmp_path / "missing"):
        pass
