"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
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
