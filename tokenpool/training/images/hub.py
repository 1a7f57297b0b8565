"""Images from Hugging Face `datasets`: saved data sets, parquet files, tar shards and names on the hub."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tokenpool.training.images.base import Images
from tokenpool.training.images.shards import IMAGE_COLUMNS, LABEL_COLUMNS, check_numbering, samples_of_shards
from tokenpool.training.images.sources import HUB, SPLITS, is_hidden


class HubImages(Images):
    """A split of a data set of Hugging Face `datasets`, memory-mapped. `root` begins with "hf:"."""

    def __init__(self, root: str, part: str, transform: Callable | None = None, allow_truncated: bool = False) -> None:
        datasets = _datasets()
        split, dataset = _split(datasets, root, part)
        self.title = f"{split} of {root}"
        self.column = _image_column(datasets, dataset.features, self.title)
        classes, labels = _labels(datasets, dataset, self.title)
        cached = [Path(file["filename"]) for file in dataset.cache_files]
        self.files = " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in cached)
        self.bytes_each = sum(file.stat().st_size for file in cached) // max(len(dataset), 1)  # the mean
        dataset = dataset.with_format(None).select_columns([self.column])
        if isinstance(dataset.features[self.column], datasets.Image):
            dataset = dataset.cast_column(self.column, datasets.Image(decode=False))
        self.dataset = dataset
        super().__init__(classes, labels, transform, allow_truncated)

    def source(self, index: int) -> tuple[Path | bytes, str]:
        value, name = self.dataset[int(index)][self.column], f"{index} of {self.title}"
        if not isinstance(value, dict):
            return value or b"", name
        path = value.get("path")
        if path:
            name += f" ({path})"
        return (Path(path) if value["bytes"] is None and path else value["bytes"] or b""), name

    def stamp(self, index: int) -> str:
        return f"{index} {self.files}"

    def relative_name(self, index: int) -> str:
        return str(index)

    def size(self, index: int) -> int:
        return self.bytes_each


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f'{HUB} needs the package datasets: pip install "tokenpool[datasets]", or pip install -e ".[datasets]"'
        ) from error
    return datasets


def _split(datasets: ModuleType, root: str, part: str) -> tuple[str, Any]:
    """Return name and data of the split for a part."""
    source = root.removeprefix(HUB)
    folder = Path(source).expanduser()
    try:
        if not folder.is_dir():
            if not source or source.startswith((".", "/", "~")):
                raise FileNotFoundError(f"no folder {source}")
            name = _chosen_split(part, datasets.get_dataset_split_names(source))
            return name, datasets.load_dataset(source, split=name)
        if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, dict):
                raise ValueError("it is a single Dataset, expected a DatasetDict with train and validation")
            name = _chosen_split(part, saved)
            return name, saved[name]
        splits, suffix = _files(folder)
        name = _chosen_split(part, splits)
        check_numbering(splits[name])
        if suffix == ".parquet":
            return name, datasets.load_dataset("parquet", data_files={name: list(map(str, splits[name]))}, split=name)
        # Not by load_dataset("webdataset"), which ignores fields that the first five samples do not have, and stops
        # without an error at damaged data.
        shards = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in splits[name]]
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        return name, datasets.Dataset.from_generator(samples_of_shards, features, gen_kwargs={"shards": shards})
    except Exception as error:  # datasets raises many kinds of errors, with the reason in the cause
        reason = str(error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error)
        raise ValueError(f"cannot open {root}: {reason}") from error


def _chosen_split(part: str, found: Iterable[str]) -> str:
    for name in SPLITS[part]:
        if name in found:
            return name
    raise ValueError(f"it has the splits {', '.join(found) or 'none'}, expected {' or '.join(SPLITS[part])}")


def _files(folder: Path) -> tuple[dict[str, list[Path]], str]:
    """Return the parquet files or tar shards of each split, and their suffix.

    Raises:
        ValueError: if there are no such files, or if a name matches two splits.
    """
    for suffix in (".parquet", ".tar"):
        splits: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob(f"*{suffix}")):
            parents = path.relative_to(folder).parent.parts
            if any(map(is_hidden, (path.name, *parents))):
                continue
            for text in (path.stem, *reversed(parents)):  # the name of the file has priority over folders
                names = set(re.split("[^a-z]+", text.lower())) & {name for names in SPLITS.values() for name in names}
                if len(names) > 1:
                    raise ValueError(f"{path} could belong to {' or '.join(sorted(names))}: rename {text!r}")
                if names:
                    splits.setdefault(names.pop(), []).append(path)
                    break
        if splits:
            return splits, suffix
    raise ValueError(
        f"it has no data: expected a folder of datasets.save_to_disk, or files such as train-*.parquet or "
        f"train-*.tar; found {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}"
    )


def _image_column(datasets: ModuleType, features: Any, title: str) -> str:
    column = _column(features, IMAGE_COLUMNS, "images", title)
    feature = features[column]
    is_bytes = isinstance(feature, datasets.Value) and "binary" in feature.dtype
    if not (isinstance(feature, datasets.Image) or is_bytes or (isinstance(feature, dict) and "bytes" in feature)):
        raise ValueError(f"column {column} of {title} holds {feature}, expected images")
    return column


def _column(features: Any, names: tuple[str, ...], content: str, title: str) -> str:
    found = [name for name in names if name in features]
    if len(found) != 1:
        raise ValueError(
            f"{title} has the columns {', '.join(features)}, expected one for {content}: {' or '.join(names)}"
        )
    return found[0]


def _labels(datasets: ModuleType, dataset: Any, title: str) -> tuple[list[str], np.ndarray]:
    """Return the names of the classes, and the label of each image."""
    column = _column(dataset.features, LABEL_COLUMNS, "labels", title)
    feature = dataset.features[column]
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if not len(values):
        raise ValueError(f"{title} has no images")
    if values.null_count:
        index = int(np.argmax(values.is_null().to_numpy()))
        raise ValueError(f"image {index} of {title} has no label")
    labels = values.to_numpy()
    if labels.dtype.kind not in "iu":
        raise ValueError(f"column {column} of {title} holds {feature}, expected integers or a ClassLabel")
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        if not 0 <= labels.min() <= labels.max() < len(names):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(
                f"{title} has the label {wrong}, expected 0..{len(names) - 1}: choose a split with public labels"
            )
        return names, labels.astype(np.int64)
    distinct = np.unique(labels)
    if distinct[0] != 0 or distinct[-1] != len(distinct) - 1:
        raise ValueError(
            f"{title} has {len(distinct)} labels in {distinct[0]}..{distinct[-1]}, expected 0..{len(distinct) - 1}"
        )
    return [str(label) for label in distinct], labels.astype(np.int64)
