"""Fingerprints of images and of weights: short texts that differ where the content differs."""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from tqdm import tqdm

from tokenpool import files
from tokenpool.training.images import Images

READ_BYTES = 2**31  # so much of a data set's content is read; of a larger one, evenly spaced images

T = TypeVar("T")

_BLOCK = 512  # images that a thread asks for at a time
_THREADS = 16  # that ask for sizes and times: on a network file system most of the time is waiting


def of_images(images: Images) -> str:
    """Fingerprint of one part of a data set: its classes, labels, and the names, sizes and content of its images.

    All content is read up to 2 GiB (`READ_BYTES`). Of a larger data set every n-th image is read, so that ImageNet
    takes a minute or two, and the other images are told apart by name and size. The result is kept in a cache under the
    sizes and times of all files, so that nothing is read again while no file is touched.

    Args:
        images: from `tokenpool.training.images.open_images`.

    Returns:
        Such as "1000 images of 1000 classes, 3fa9c1d2e0ab4c55".
    """
    about = f"{len(images)} images of {len(images.classes)} classes"
    stamp = _digest([str(READ_BYTES), *_description(images), *_parallel(images.stamp, len(images), f"list of {about}")])
    cached = files.cache_folder() / "fingerprints" / stamp
    try:
        return f"{about}, {cached.read_text()}"
    except OSError:
        pass
    sizes = np.fromiter(_parallel(images.size, len(images), f"sizes of {about}"), dtype=np.int64, count=len(images))
    stride = max(math.ceil(int(sizes.sum()) / READ_BYTES), 1)
    read = tqdm(range(0, len(images), stride), desc=f"fingerprint of {about}", unit="image", leave=False, delay=2)
    names = (f"{images.relative_name(index)} {size}" for index, size in enumerate(sizes))
    found = _digest([*_description(images), *names, *(_of_bytes(images.content(index)) for index in read)])[:16]
    try:
        with files.whole(cached) as path:
            path.write_text(found)
    except OSError:
        pass  # without a cache it takes longer, and is as right
    return f"{about}, {found}"


def of_arrays(*arrays: np.ndarray) -> str:
    """Fingerprint of arrays: of their types, shapes and values."""
    parts = [f"{array.dtype.str} {array.shape} {_of_bytes(np.ascontiguousarray(array).tobytes())}" for array in arrays]
    return _digest(parts)[:16]


def of_weights(path: str | Path) -> str:
    """Fingerprint of a file of weights, or of a folder with all files in it: of the content, not of the name.

    Raises:
        FileNotFoundError: if there is neither.
        ValueError: if it is a URL.
    """
    path = Path(path)
    files.check_local(path)
    if path.is_dir():
        inside = sorted(file for file in path.rglob("*") if file.is_file())
        return _digest([f"{file.relative_to(path)} {_of_file(file)}" for file in inside])[:16]
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    return _of_file(path)[:16]


def _description(images: Images) -> list[str]:
    """Classes and labels: what the images are taken for."""
    return [*images.classes, _of_bytes(np.asarray(images.labels, dtype=np.int64).tobytes())]


def _parallel(ask: Callable[[int], T], count: int, title: str) -> Iterator[T]:
    """`ask(index)` for each index, in order, by several threads."""
    blocks = [range(first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK)]
    with ThreadPoolExecutor(_THREADS) as executor, tqdm(total=count, desc=title, leave=False, delay=2) as bar:
        for answers in executor.map(lambda block: [ask(index) for index in block], blocks):
            yield from answers
            bar.update(len(answers))


def _of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(texts: Iterable[str]) -> str:
    """Of a sequence of texts; each ends in a zero, which no name holds, so that none runs into the next."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
