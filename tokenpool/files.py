"""Files that are there whole or not at all, and paths that are none."""

import os
import re
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
