# SPDX-License-Identifier: Apache-2.0
"""Folders for what is being written, which outlive a killed process only until the next one writes there."""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX, _LOCK = ".wedlm-writing-", ".wedlm-lock"
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # what such file systems answer


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in ``parent`` that only this user can enter; at the end it is removed with all that is in it.

    The folder of a process that was killed stays; the user's next call for this ``parent``, in any process, removes
    it. Its owner holds a lock meanwhile, which the system releases with the process. All machines that write to
    ``parent`` must see each other's locks, as they do through NFS; where the file system has no locks, such folders
    stay. Raises OSError if ``parent`` cannot be written to.
    """
    _remove_left_over(parent)
    folder, lock = _new_folder(parent)
    try:
        yield folder
    finally:
        _remove(folder, lock)


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    """A new folder, and the open file that locks it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        try:
            return folder, _locked(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process removed it before it was locked
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                return folder, None
            _remove(folder, None)
            raise


def _remove_left_over(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        if folder.is_symlink():
            continue
        with suppress(OSError):  # a process writes there, or it is another user's
            _remove(folder, _locked(folder))


def _remove(folder: Path, lock: int | None) -> None:
    """Remove the folder with all that is in it, and release its lock."""
    shutil.rmtree(folder, ignore_errors=True)
    if lock is not None:
        os.close(lock)
        # NFS keeps an open file in its folder under another name until it is closed.
        with suppress(OSError):
            folder.rmdir()


def _locked(folder: Path) -> int:
    """Lock a folder, and return the open file that holds the lock. Raises OSError if another process has it or has
    removed the folder."""
    lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)  # a link may be another user's trap
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(lock), (folder / _LOCK).stat()):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except OSError:
        os.close(lock)
        raise
    return lock
