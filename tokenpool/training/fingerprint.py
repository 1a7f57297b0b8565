"""Fingerprints of images and weights: short texts that differ if the content differs."""

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

READ_BYTES = 2**31  # maximum size of a data set that is read completely

T = TypeVar("T")

_BLOCK = 512  # images that a thread handles at a time
_THREADS = 16  # threads that read sizes and times, because a network file system is slow to answer


def of_images(images: Images) -> str:
    """Compute the fingerprint of one part of a data set.

    The fingerprint depends on classes, labels, and the names, sizes and content of the images. Up to 2 GiB
    (`READ_BYTES`), all content is read. In a larger data set, only every n-th image is read, so ImageNet takes one or
    two minutes. The other images count with name and size only. The result is stored in a cache. The key of the cache
    contains sizes and times of all files, so nothing is read again while the files do not change.

    Args:
        images: result of `tokenpool.training.images.open_images`.

    Returns:
        A text such as "1000 images of 1000 classes, 3fa9c1d2e0ab4c55".
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
        with files.atomic_write(cached) as path:
            path.write_text(found)
    except OSError:
        pass  # the cache only saves time
    return f"{about}, {found}"


def of_arrays(*arrays: np.ndarray) -> str:
    """Compute the fingerprint of the types, shapes and values of arrays."""
    parts = [f"{array.dtype.str} {array.shape} {_of_bytes(np.ascontiguousarray(array).tobytes())}" for array in arrays]
    return _digest(parts)[:16]


def of_weights(path: str | Path) -> str:
    """Compute the fingerprint of the content of a file of weights, or of all files in a folder.

    Args:
        path: path of the file or folder. Its name does not change the fingerprint.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if the path is a URL.
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
    """Describe classes and labels."""
    return [*images.classes, _of_bytes(np.asarray(images.labels, dtype=np.int64).tobytes())]


def _parallel(function: Callable[[int], T], count: int, title: str) -> Iterator[T]:
    """Call `function(index)` for each index in several threads, and yield the results in order."""
    blocks = [range(first, min(first + _BLOCK, count)) for first in range(0, count, _BLOCK)]
    with ThreadPoolExecutor(_THREADS) as executor, tqdm(total=count, desc=title, leave=False, delay=2) as bar:
        for found in executor.map(lambda block: [function(index) for index in block], blocks):
            yield from found
            bar.update(len(found))


def _of_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _of_file(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(texts: Iterable[str]) -> str:
    """Hash a sequence of texts. A zero byte, which names cannot contain, separates them."""
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()
