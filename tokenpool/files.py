"""Files that are there whole or not at all."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import safetensors


@contextmanager
def whole(path: str | Path) -> Iterator[Path]:
    """A file to write in place of `path`, whose place it takes when the block ends without an error.

    Until then, and whatever happens (an error, a full disk, a kill), what stood at `path` stays as it was. Its
    folder is made if need be.

    Raises:
        OSError: if the file cannot be written, as on a full disk; the message names it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
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
    chosen = os.environ.get("TOKENPOOL_CACHE")
    if chosen:
        return Path(chosen)
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
