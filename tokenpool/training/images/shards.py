"""Images from tar shards in webdataset's layout."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenpool.training.images.sources import is_hidden

IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
LABEL_COLUMNS = ("label", "labels", "cls")


def check_numbering(shards: list[Path]) -> None:
    """Check that all files are present if their names are like `train-00002-of-00005`.

    Raises:
        ValueError: if files are missing. The message lists their numbers.
    """
    numbers = [re.search(r"-(\d+)-of-(\d+)$", shard.stem) for shard in shards]
    found = [number for number in numbers if number]
    if not found or len(found) < len(shards):
        return
    count = int(found[0][2])
    missing = set(range(count)) - {int(number[1]) for number in found}
    if missing:
        shown = ", ".join(map(str, sorted(missing)[:8]))
        raise ValueError(f"{len(missing)} of the {found[0][2]} files like {shards[0].name} are missing: number {shown}")


def samples_of_shards(shards: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """Yield image and label of each sample in tar shards of webdataset's layout, with members `KEY.jpg` and `KEY.cls`.

    Args:
        shards: path, size and modification time of each shard. Size and time make `datasets` read changed shards again.

    Raises:
        ValueError: if a sample does not have exactly one label and one image, or if a shard is incomplete or damaged.
            The message names the sample or shard.
    """
    for shard, *_ in shards:
        with tarfile.open(shard) as tar:
            key, fields = None, {}
            for member in tar:
                if member.isdir() or any(map(is_hidden, member.name.removeprefix("./").split("/"))):
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, field = base.partition(".")
                if key not in (None, f"{folder}/{stem}"):
                    yield _sample(fields, f"{shard}/{key.strip('/')}")
                    fields = {}
                key = f"{folder}/{stem}"
                if field.lower() in fields:
                    raise ValueError(f"{shard} has {member.name} twice")
                file = tar.extractfile(member)
                if file is None:
                    raise ValueError(f"{shard} has {member.name}, which is not a file")
                fields[field.lower()] = file.read()
            if key is not None:
                yield _sample(fields, f"{shard}/{key.strip('/')}")
            _check_end(tar, shard)


def _sample(fields: dict[str, bytes], name: str) -> dict[str, Any]:
    images = [field for field in fields if field in IMAGE_COLUMNS]
    labels = [field for field in fields if field in LABEL_COLUMNS]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{name} has {', '.join(sorted(fields))}, expected one image ({', '.join(IMAGE_COLUMNS)}) and one class "
            f"({', '.join(LABEL_COLUMNS)})"
        )
    try:
        label = int(fields[labels[0]])
    except ValueError as error:
        raise ValueError(
            f"{name}.{labels[0]} holds {fields[labels[0]][:20]!r}, expected the number of a class"
        ) from error
    return {"image": {"bytes": fields[images[0]], "path": f"{Path(name).name}.{images[0]}"}, "label": label}


def _check_end(tar: tarfile.TarFile, shard: str) -> None:
    """Check that zeros follow the last member, because `tarfile` stops at a damaged or missing header without error."""
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(2 * tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end) or any(map(any, iter(lambda: tar.fileobj.read(2**20), b""))):
        raise ValueError(f"{shard} is incomplete or damaged at byte {tar.offset}: copy it again")
