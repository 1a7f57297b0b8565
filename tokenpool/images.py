"""Images with labels, by index: from folders in ImageNet's layout, and from Hugging Face `datasets`.

A source is a folder, or "hf:" and what `datasets` can open: a folder written by `save_to_disk`, a folder of parquet
files or of tar shards in webdataset's layout, or a name on the Hugging Face hub, such as "hf:ILSVRC/imagenet-1k".
"""

import os
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from timm.utils import natural_key
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.folder import IMG_EXTENSIONS, is_image_file

from tokenpool import files
from tokenpool.files import alone, cache_folder

HUB = "hf:"
DOWNLOADED = ("cifar10",)  # what torchvision downloads, by name

_PARTS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}  # under which names, the best first
_IMAGE_COLUMNS = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_COLUMNS = ("label", "labels", "cls")
# What systems leave in folders that they have no business in, beside names that begin with a dot.
_LEFTOVERS = ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN", "System Volume Information")


def open_images(
    root: str | Path,
    part: str,
    transform: Callable[[Image.Image], Any] | None = None,
    allow_empty: bool = False,
    allow_truncated: bool = False,
) -> "Images":
    """The images of one part of a data set, in an order that does not change.

    Args:
        root: a folder that holds `<part>/<class>/<image>`; or, as a string, "hf:" and a folder written by
            `datasets.save_to_disk`, a folder of parquet files or tar shards in webdataset's layout whose names say the
            part (`train-000.tar`), or a name on the Hugging Face hub. Parquet files and shards are copied once into the
            cache of `datasets` ($HF_HOME), from which images are read by index. Or "cifar10", where there is no folder
            of that name: torchvision's, downloaded into `tokenpool.files.cache_folder`.
        part: "train" or "val". Where there is no val (`validation` with "hf:"), `test` is taken.
        transform: of the image; None leaves it a PIL image.
        allow_empty: let a class folder be empty. The class counts, and has no image.
        allow_truncated: see `load_image`.

    Raises:
        FileNotFoundError: if a folder is missing or holds no image.
        RuntimeError: if the package `datasets` is needed and missing.
        ValueError: if there is no such part, if columns are missing, if labels are not 0..C-1, if images lie outside of
            class folders, or if `root` is a URL; the message says what was found and what was expected.
    """
    if part not in _PARTS:
        raise ValueError(f"part = {part!r} must be one of {', '.join(_PARTS)}")
    if str(root).startswith(HUB):
        return HubImages(str(root), part, transform, allow_truncated)
    if is_downloaded(root):
        return Cifar10Images(part, transform)
    return FolderImages(Path(root), part, transform, allow_empty, allow_truncated)


def is_downloaded(root: str | Path) -> bool:
    """Whether a source is the name of a data set that torchvision downloads; a folder of that name goes before it."""
    return str(root) in DOWNLOADED and not Path(root).is_dir()


def first_of_each_class(images: "Images", count: int, title: str) -> np.ndarray:
    """Numbers of the first `count` images of each class, ascending; of all images if `count` is 0.

    Args:
        images: with `labels` and `classes`.
        count: images a class.
        title: what messages call them.

    Raises:
        ValueError: if a class has fewer; the message says which class has how many.
    """
    if not count:
        return np.arange(len(images))
    chosen = [np.flatnonzero(images.labels == label)[:count] for label in range(len(images.classes))]
    short = [f"{name} has {len(few)}" for name, few in zip(images.classes, chosen, strict=True) if len(few) < count]
    if short:
        more = f" and {len(short) - 8} more" if len(short) > 8 else ""
        raise ValueError(f"{title}: expected {count} images of each class, but {', '.join(short[:8])}{more}")
    return np.sort(np.concatenate(chosen))


class Images(Dataset):
    """Images of one part of a data set, each with its label, by index.

    A subclass says where an image comes from (`source`) and what changes when the image does (`stamp`).

    Attributes:
        classes: their names; label l is class `classes[l]`.
        labels: of all images, (N,) integers.
    """

    def __init__(
        self, classes: list[str], labels: np.ndarray, transform: Callable | None, allow_truncated: bool = False
    ) -> None:
        self.classes = classes
        self.labels = labels
        self.transform = transform
        self.allow_truncated = allow_truncated  # here, so that it reaches the processes that load data

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = load_image(*self.source(index), self.allow_truncated)
        return self.transform(image) if self.transform else image, int(self.labels[index])

    def name(self, index: int) -> str:
        """What messages call the image."""
        return self.source(index)[1]

    def source(self, index: int) -> tuple[Path | bytes, str]:
        """What `load_image` takes: the image's file or its bytes, and its name."""
        raise NotImplementedError

    def stamp(self, index: int) -> str:
        """A text that is another one if the image has changed, without reading it."""
        raise NotImplementedError

    def relative_name(self, index: int) -> str:
        """The image's name within the data set, wherever that lies."""
        raise NotImplementedError

    def content(self, index: int) -> bytes:
        """The image's bytes, not decoded."""
        file, _ = self.source(index)
        return file if isinstance(file, bytes) else Path(file).read_bytes()

    def size(self, index: int) -> int:
        """Length of `content` in bytes, or what comes near it without reading the image."""
        return os.stat(self.source(index)[0]).st_size


class FolderImages(Images):
    """A folder in ImageNet's layout, `root/<part>/<class>/<image>`; labels number the classes in natural order."""

    def __init__(
        self,
        root: Path,
        part: str,
        transform: Callable | None = None,
        allow_empty: bool = False,
        allow_truncated: bool = False,
    ) -> None:
        self.folder = part_folder(root, part)
        classes = class_names(self.folder)
        listed = [_image_files(self.folder / name) for name in classes]
        empty = [name for name, found in zip(classes, listed, strict=True) if not found]
        if empty and not (allow_empty and len(empty) < len(classes)):
            raise FileNotFoundError(
                f"{len(empty)} of the {len(classes)} class folders in {self.folder} hold no image "
                f"({', '.join(IMG_EXTENSIONS)}): {_some(empty)}. Remove them, or let classes be empty "
                "(--allow-empty-classes, allow_empty=True)"
            )
        # An array, not a list of a million texts: counting references to those copies them into every worker.
        self.paths = np.array([os.fsencode(os.path.relpath(path, self.folder)) for found in listed for path in found])
        labels = np.repeat(np.arange(len(classes)), [len(found) for found in listed])
        super().__init__(classes, labels, transform, allow_truncated)

    def source(self, index: int) -> tuple[Path, str]:
        path = self.folder / self.relative_name(index)
        return path, str(path)

    def stamp(self, index: int) -> str:
        path, name = self.source(index)[0], self.relative_name(index)
        try:
            status = os.stat(path)
        except OSError as error:  # a link to nothing, for one: what reads the image says so
            return f"{name} {error.strerror}"
        return f"{name} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"

    def relative_name(self, index: int) -> str:
        return os.fsdecode(bytes(self.paths[index]))


def part_folder(root: Path, part: str) -> Path:
    """The folder of a part of images in ImageNet's layout.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if `root` is a URL.
    """
    check_no_url(root)
    folders = [root / name for name in (("train",) if part == "train" else ("val", "test"))]
    for folder in folders:
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no folder {folders[0]}: expected ImageNet's layout, {folders[0]}/<class>/<image>")


def check_no_url(root: str | Path) -> None:
    """Refuse a URL as a source of images.

    Raises:
        ValueError: if `root` is one.
    """
    if not str(root).startswith(HUB):
        files.check_local(root, instead=f", or name a data set of the Hugging Face hub as {HUB}OWNER/NAME")


def class_names(folder: Path) -> list[str]:
    """The class folders in a folder; label l is the l-th of them.

    Names are in natural order (0, 1, 2, 10), as in timm. Names that begin with a dot are no classes.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are images beside them, which have no class, or a link to nothing.
    """
    with os.scandir(folder) as listed:
        entries = [entry for entry in listed if not _is_hidden(entry.name)]
    classes = sorted((entry.name for entry in entries if entry.is_dir()), key=lambda name: (natural_key(name), name))
    broken = sorted(entry.path for entry in entries if entry.is_symlink() and not os.path.exists(entry.path))
    if broken:  # of a class whose disk is not mounted, perhaps; without it the labels of all others would be wrong
        raise ValueError(f"{broken[0]} is a link to {os.readlink(broken[0])}, which does not exist: mend or remove it")
    loose = sorted(entry.name for entry in entries if is_image_file(entry.name) and entry.is_file())
    if loose:
        raise ValueError(
            f"{len(loose)} images ({_some(loose)}) lie in {folder} itself and so have no class: expected "
            f"{folder}/<class>/<image>.{_SORTING if any(map(_VALIDATION.match, loose)) else ''}"
        )
    if not classes:
        raise FileNotFoundError(f"no class folder in {folder}: expected {folder}/<class>/<image>")
    return classes


_VALIDATION = re.compile(r"ILSVRC2012_val_\d{8}\.", re.IGNORECASE)
_SORTING = (
    " These are ImageNet's validation images as they come. To sort them into folders of WordNet ids, put "
    "ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz into a folder, and run in Python "
    'torchvision.datasets.ImageNet(FOLDER, split="val"); then FOLDER is what --data takes. Or move each image into a '
    "folder of its WordNet id, which Kaggle's LOC_val_solution.csv lists"
)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in _LEFTOVERS


def _image_files(folder: Path) -> list[str]:
    """The images in a class folder and its sub-folders, links followed, sorted by folder and name."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        for path in (os.path.join(parent, name) for name in folders):
            if os.path.islink(path) and Path(os.path.realpath(parent)).is_relative_to(os.path.realpath(path)):
                raise ValueError(f"{path} is a link to a folder that it lies in: remove it")
        found += [(parent, name) for name in names if is_image_file(name) and not _is_hidden(name)]
    return [os.path.join(*pair) for pair in sorted(found)]


def _raise(error: OSError) -> None:
    """What `os.walk` does not do by itself: it passes over a folder that it must not read."""
    raise error


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


class HubImages(Images):
    """A split of Hugging Face `datasets`, memory-mapped; `root` begins with "hf:"."""

    def __init__(self, root: str, part: str, transform: Callable | None = None, allow_truncated: bool = False) -> None:
        datasets = _datasets()
        split, dataset = _split(datasets, root, part)
        self.title = f"{split} of {root}"
        self.column = _image_column(datasets, dataset.features, self.title)
        classes, labels = _labels(datasets, dataset, self.title)
        cached = [Path(file["filename"]) for file in dataset.cache_files]
        self.files = " ".join(f"{file.name} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in cached)
        self.bytes_each = sum(file.stat().st_size for file in cached) // max(len(dataset), 1)  # on the average
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


class Cifar10Images(Images):
    """CIFAR-10 (Krizhevsky 2009) by torchvision, which downloads it into the cache folder and checks it."""

    def __init__(self, part: str, transform: Callable | None = None) -> None:
        folder = cache_folder() / "cifar10"
        try:
            with alone(folder / ".lock"):
                opened = CIFAR10(folder, train=part == "train", download=True)
        except Exception as error:  # of the network, of the disk, and of a download that was cut off
            raise ValueError(
                f"cannot download CIFAR-10 into {folder} ({error}); --data can also name a folder of it, or "
                f"{HUB}uoft-cs/cifar10"
            ) from error
        self.pixels = opened.data  # (N, 32, 32, 3) uint8
        self.title = f"{part} of CIFAR-10"
        files = opened.train_list if opened.train else opened.test_list
        self.files = " ".join(checksum for _, checksum in files)
        super().__init__(list(opened.classes), np.array(opened.targets), transform)

    def source(self, index: int) -> tuple[bytes, str]:
        file = BytesIO()
        Image.fromarray(self.pixels[index]).save(file, "PNG")  # which loses nothing
        return file.getvalue(), f"{index} of {self.title}"

    def stamp(self, index: int) -> str:
        return f"{index} {self.files}"

    def relative_name(self, index: int) -> str:
        return str(index)

    def content(self, index: int) -> bytes:
        return self.pixels[index].tobytes()

    def size(self, index: int) -> int:
        return self.pixels[index].nbytes


def load_image(
    file: str | Path | bytes | BinaryIO, name: str | None = None, allow_truncated: bool = False
) -> Image.Image:
    """An image as RGB, upright, 8 bits a channel; what is transparent becomes white.

    Args:
        file: its path, its bytes, or a file that is open for reading.
        name: what messages call it; default: the path.
        allow_truncated: accept an image whose end is missing or whose checksums are wrong, as
            `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` does. What is missing becomes grey or black.

    Raises:
        ValueError: if the file is missing, empty, damaged or no image, or holds floating-point values; the message
            names it.
    """
    if name is None:
        name = f"of {len(file)} bytes" if isinstance(file, bytes) else str(file)
    try:
        with _truncated(allow_truncated), Image.open(BytesIO(file) if isinstance(file, bytes) else file) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode == "F":
                raise ValueError("its values are floating-point, of no known range; expected 8 or 16 bits")
            if image.mode.startswith("I"):  # more than 8 bits, which Pillow would clip to white
                image = Image.fromarray(_eight_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return image.convert("RGB")
    except UnidentifiedImageError as error:  # whose message names a file once more, or an address in memory
        reason = "it is empty" if _is_empty(file) else "it is in no format that Pillow knows"
        raise ValueError(f"cannot read image {name}: {reason}") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS // 10**6
        raise ValueError(f"image {name} has more than {most} million pixels: scale it down first") from error
    except FileNotFoundError as error:
        link = f"it is a link to {os.readlink(file)}, which does not exist" if os.path.islink(file) else ""
        raise ValueError(f"cannot read image {name}: {link or 'there is no such file'}") from error
    except Exception as error:  # Pillow raises whatever the decoder does
        raise ValueError(f"cannot read image {name}: {error}") from error


@contextmanager
def _truncated(allowed: bool) -> Iterator[None]:
    """Pillow has this switch for the whole process only."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = before or allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _is_empty(file: str | Path | bytes | BinaryIO) -> bool:
    if isinstance(file, bytes):
        return not file
    if isinstance(file, str | Path):
        return os.path.isfile(file) and os.path.getsize(file) == 0
    return file.seek(0, os.SEEK_END) == 0


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Values of 16 bits, or of 8 in a wider type, as 8 bits."""
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError(f"its values lie in {values.min()}..{values.max()}; expected 8 or 16 bits")
    wide = values.dtype.itemsize == 2 or values.max(initial=0) > 255
    return (values // 257 if wide else values).astype(np.uint8)


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise RuntimeError(
            f'{HUB} needs the package datasets: pip install "tokenpool[datasets]", or pip install -e ".[datasets]"'
        ) from error
    return datasets


def _split(datasets: ModuleType, root: str, part: str) -> tuple[str, Any]:
    """Name and data of the split that `part` means."""
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
                raise ValueError("it is a single Dataset; expected a DatasetDict with train and validation")
            name = _chosen_split(part, saved)
            return name, saved[name]
        splits, suffix = _files(folder)
        name = _chosen_split(part, splits)
        _check_numbering(splits[name])
        if suffix == ".parquet":
            return name, datasets.load_dataset("parquet", data_files={name: list(map(str, splits[name]))}, split=name)
        # Not by load_dataset("webdataset"), which drops what the first five samples do not have, and ends at damage.
        shards = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in splits[name]]
        features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.Value("int64")})
        return name, datasets.Dataset.from_generator(samples_of_shards, features, gen_kwargs={"shards": shards})
    except Exception as error:  # of many kinds, with the reason in the cause
        reason = str(error.__cause__ if type(error).__name__ == "DatasetGenerationError" else error)
        raise ValueError(f"cannot open {root}: {reason}") from error


def _chosen_split(part: str, found: Iterable[str]) -> str:
    for name in _PARTS[part]:
        if name in found:
            return name
    raise ValueError(f"it has the splits {', '.join(found) or 'none'}; expected {' or '.join(_PARTS[part])}")


def _files(folder: Path) -> tuple[dict[str, list[Path]], str]:
    """The parquet files or tar shards of each split, and which of the two they are.

    Raises:
        ValueError: if there are none, or if a name could mean two splits.
    """
    for suffix in (".parquet", ".tar"):
        splits: dict[str, list[Path]] = {}
        for path in sorted(folder.rglob(f"*{suffix}")):
            parents = path.relative_to(folder).parent.parts
            if any(map(_is_hidden, (path.name, *parents))):
                continue
            for text in (path.stem, *reversed(parents)):  # the file's own name says it, else a folder's
                names = set(re.split("[^a-z]+", text.lower())) & {name for names in _PARTS.values() for name in names}
                if len(names) > 1:
                    raise ValueError(f"{path} could belong to {' or to '.join(sorted(names))}: rename {text!r}")
                if names:
                    splits.setdefault(names.pop(), []).append(path)
                    break
        if splits:
            return splits, suffix
    raise ValueError(
        f"no data in it: expected a folder of datasets.save_to_disk, or files like train-*.parquet or "
        f"train-*.tar; found {', '.join(sorted(path.name for path in folder.iterdir())[:8]) or 'nothing'}"
    )


def _check_numbering(shards: list[Path]) -> None:
    """Of files named `train-00002-of-00005`, all five must be there."""
    numbers = [re.search(r"-(\d+)-of-(\d+)$", shard.stem) for shard in shards]
    if not all(numbers):
        return
    present = {int(number[1]) for number in numbers}
    missing = set(range(int(numbers[0][2]))) - present
    if missing:
        shown = ", ".join(map(str, sorted(missing)[:8]))
        raise ValueError(
            f"of the {numbers[0][2]} files like {shards[0].name}, {len(missing)} are missing: number {shown}"
        )


def samples_of_shards(shards: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    """Image and label of each sample of tar shards in webdataset's layout: `<key>.jpg` and `<key>.cls`, side by side.

    Args:
        shards: path, size and time of change of each. The last two have `datasets` read a shard again that has changed.

    Raises:
        ValueError: if a sample has no label, or not one image, or if a shard is cut off or damaged; it is named.
    """
    for shard, *_ in shards:
        with tarfile.open(shard) as tar:
            key, fields = None, {}
            for member in tar:
                if member.isdir() or any(map(_is_hidden, member.name.removeprefix("./").split("/"))):
                    continue
                folder, _, file = member.name.rpartition("/")
                stem, _, field = file.partition(".")
                if key not in (None, f"{folder}/{stem}"):
                    yield _sample(fields, f"{shard}/{key.strip('/')}")
                    fields = {}
                key = f"{folder}/{stem}"
                if field.lower() in fields:
                    raise ValueError(f"{shard} has {member.name} twice")
                fields[field.lower()] = tar.extractfile(member).read()
            if key is not None:
                yield _sample(fields, f"{shard}/{key.strip('/')}")
            _check_end(tar, shard)


def _sample(fields: dict[str, bytes], name: str) -> dict[str, Any]:
    images = [field for field in fields if field in _IMAGE_COLUMNS]
    labels = [field for field in fields if field in _LABEL_COLUMNS]
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{name} has {', '.join(sorted(fields))}; expected one image ({', '.join(_IMAGE_COLUMNS)}) and one class "
            f"({', '.join(_LABEL_COLUMNS)})"
        )
    try:
        label = int(fields[labels[0]])
    except ValueError as error:
        raise ValueError(
            f"{name}.{labels[0]} holds {fields[labels[0]][:20]!r}; expected the number of a class"
        ) from error
    return {"image": {"bytes": fields[images[0]], "path": f"{Path(name).name}.{images[0]}"}, "label": label}


def _check_end(tar: tarfile.TarFile, shard: str) -> None:
    """After the last member there must be zeros: `tarfile` takes a damaged or missing header for the end."""
    tar.fileobj.seek(tar.offset)
    end = tar.fileobj.read(2 * tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end) or any(map(any, iter(lambda: tar.fileobj.read(2**20), b""))):
        raise ValueError(f"{shard} is cut off or damaged at byte {tar.offset}")


def _image_column(datasets: ModuleType, features: Any, title: str) -> str:
    column = _column(features, _IMAGE_COLUMNS, "images", title)
    feature = features[column]
    is_bytes = isinstance(feature, datasets.Value) and "binary" in feature.dtype
    if not (isinstance(feature, datasets.Image) or is_bytes or (isinstance(feature, dict) and "bytes" in feature)):
        raise ValueError(f"column {column} of {title} holds {feature}; expected images")
    return column


def _column(features: Any, names: tuple[str, ...], content: str, title: str) -> str:
    found = [name for name in names if name in features]
    if len(found) != 1:
        raise ValueError(
            f"{title} has the columns {', '.join(features)}; expected one with {content}, called {' or '.join(names)}"
        )
    return found[0]


def _labels(datasets: ModuleType, dataset: Any, title: str) -> tuple[list[str], np.ndarray]:
    """Names of the classes, and the label of each image."""
    column = _column(dataset.features, _LABEL_COLUMNS, "labels", title)
    feature = dataset.features[column]
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if not len(values):
        raise ValueError(f"{title} has no images")
    if values.null_count:
        index = int(np.argmax(values.is_null().to_numpy()))
        raise ValueError(f"image {index} of {title} has no label")
    labels = values.to_numpy()
    if labels.dtype.kind not in "iu":
        raise ValueError(f"column {column} of {title} holds {feature}; expected integers or a ClassLabel")
    if isinstance(feature, datasets.ClassLabel):
        names = list(feature.names)
        if not 0 <= labels.min() <= labels.max() < len(names):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise ValueError(f"{title} has the label {wrong}; expected 0..{len(names) - 1}. Are its labels withheld?")
        return names, labels.astype(np.int64)
    distinct = np.unique(labels)
    if distinct[0] != 0 or distinct[-1] != len(distinct) - 1:
        raise ValueError(
            f"{title} has {len(distinct)} labels in {distinct[0]}..{distinct[-1]}; expected 0..{len(distinct) - 1}"
        )
    return [str(label) for label in distinct], labels.astype(np.int64)
