"""Atomic writing of files, locks, the cache folder, and a check for URLs."""

import fcntl
import glob
import os
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors

from tokenpool.moved import old_names

__getattr__ = old_names(__name__)  # PEP 562

CACHE = "TOKENPOOL_CACHE"  # environment variable: the cache folder
STALE_AFTER = 3600  # seconds after which a temporary file that does not grow belongs to a killed process
_NAME_BYTES = 6  # random bytes in the name of a temporary file


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: write a temporary file, which replaces `path` when the block ends without an error.

    If the block fails (an error, a full disk, a killed process), `path` does not change. Several processes and threads
    may write the same path at the same time. Each has its own temporary file, and the last one to finish wins. The
    temporary file of a killed process is deleted by the next writer of the path, after an hour. The umask determines
    the permissions of the file, as usual.

    Args:
        path: path of the file. Its folder is created if needed.

    Yields:
        The path of the temporary file.

    Raises:
        OSError: if the file cannot be written, for example on a full disk. The message names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    for left in _temporary_files(path):
        if now - _modification_time(left, otherwise=now) > STALE_AFTER:
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_NAME_BYTES)}.partial")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors makes its files readable for the user only
            temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the data must be on the disk before the file gets its name
        os.replace(temporary, path)
    except BaseException as error:
        # torch and safetensors report a full disk with their own kinds of errors.
        failed = isinstance(error, OSError | RuntimeError | safetensors.SafetensorError)
        reason = _write_error(temporary) or str(error) if failed else ""
        temporary.unlink(missing_ok=True)
        if not failed:
            raise
        state = "the old file is unchanged" if path.exists() else "the file does not exist"
        raise OSError(f"cannot write {path}: {reason}; {state}") from error


def check_local(path: str | Path, instead: str = "") -> None:
    """Check that a path is not a URL.

    Args:
        path: a path from a user. (`pathlib` changes `https://host` to `https:/host`.)
        instead: further advice for the message.

    Raises:
        ValueError: if the path is a URL. The message contains the original URL.
    """
    url = re.match(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>.*)", str(path))
    if url and not Path(path).exists():
        root = "/" if url["scheme"] == "file" else ""
        raise ValueError(
            f"{url['scheme']}://{root}{url['rest']} is a URL, expected a path: download the data first, and give the "
            f"path of the file or folder{instead}"
        )


def delete(path: Path) -> None:
    """Delete a file that no process is writing, and temporary files that killed processes have left."""
    path.unlink(missing_ok=True)
    for left in _temporary_files(path):
        left.unlink(missing_ok=True)


def _temporary_files(path: Path) -> list[Path]:
    """Return all temporary files of a path, including the files of running processes."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 2 * _NAME_BYTES}.partial"))


def _modification_time(path: Path, otherwise: float) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process has renamed or deleted it
        return otherwise


@contextmanager
def file_lock(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on a file during the block. Other processes wait for the lock.

    The file is created and never deleted. The system releases the lock if this process dies. On a file system without
    locks, the block runs without a lock.

    Args:
        path: path of the lock file. Its folder is created if needed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """Return the cache folder: $TOKENPOOL_CACHE, or else $XDG_CACHE_HOME/tokenpool, or else ~/.cache/tokenpool."""
    chosen = os.environ.get(CACHE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenpool"


def _write_error(path: Path) -> str:
    """Return the reason why a file cannot grow, such as "No space left on device", or "" if it can."""
    try:
        with open(path, "ab") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or ""
    return ""
