"""Files that are there whole or not at all, and paths that are none."""

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

CACHE = "TOKENPOOL_CACHE"  # environment variable: a folder for what can be made again
DEAD_AFTER = 3600  # seconds; a writer that has written nothing for so long was killed
_BYTES = 6  # of the number that tells writers of one path apart


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file to write in place of `path`, whose place it takes when the block ends without an error.

    Until then, and whatever happens (an error, a full disk, a kill), what stood at `path` stays as it was. Its
    folder is made if need be. Several processes and threads may write the same path at once: each writes a file of its
    own, and the last one to end stays. What killed writers have left is deleted by the next one, after an hour. Who may
    read the file is up to the umask, as usual.

    Raises:
        OSError: if the file cannot be written, as on a full disk; the message names it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    for left in _unfinished(path):
        if now - _modified(left, otherwise=now) > DEAD_AFTER:
            left.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_BYTES)}.partial")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode
        yield temporary
        if temporary.stat().st_mode != mode:  # safetensors lets nobody but the user read what it writes
            temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # on the disk before it gets its name
        os.replace(temporary, path)
    except BaseException as error:
        # torch and safetensors report a full disk by errors of their own.
        failed = isinstance(error, OSError | RuntimeError | safetensors.SafetensorError)
        reason = _refusal(temporary) or str(error) if failed else ""
        temporary.unlink(missing_ok=True)
        if not failed:
            raise
        state = "what it held before is still there" if path.exists() else "there is no such file now"
        raise OSError(f"cannot write {path}: {reason}; {state}") from error


def check_local(path: str | Path, instead: str = "") -> None:
    """Refuse a URL where a path is expected.

    Args:
        path: that a user has given; `pathlib` makes `https:/host` of `https://host`.
        instead: what the message proposes beside a download.

    Raises:
        ValueError: if it is a URL; the message gives it as it was.
    """
    url = re.match(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/+(?P<rest>.*)", str(path))
    if url and not Path(path).exists():
        root = "/" if url["scheme"] == "file" else ""
        raise ValueError(
            f"{url['scheme']}://{root}{url['rest']} is a URL, and URLs are not read: download it first, and give the "
            f"path of the file or folder{instead}"
        )


def delete(path: Path) -> None:
    """Delete a file that nobody is writing, and what killed writers of it have left."""
    path.unlink(missing_ok=True)
    for left in _unfinished(path):
        left.unlink(missing_ok=True)


def _unfinished(path: Path) -> list[Path]:
    """The temporary files of a path, those of its present writers among them."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 2 * _BYTES}.partial"))


def _modified(path: Path, otherwise: float) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # its writer has ended
        return otherwise


@contextmanager
def alone(path: str | Path) -> Iterator[None]:
    """Wait until no other process is in such a block with the same file, which is made for it and stays.

    The system lets go of it if this process dies. On a file system without locks nobody waits.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cache_folder() -> Path:
    """The folder for files that can be made again: $TOKENPOOL_CACHE, or ~/.cache/tokenpool (XDG_CACHE_HOME counts)."""
    chosen = os.environ.get(CACHE)
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokenpool"


def _refusal(path: Path) -> str:
    """Why the system takes no more of a file, such as "No space left on device"; empty if it does."""
    try:
        with open(path, "ab") as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or ""
    return ""
