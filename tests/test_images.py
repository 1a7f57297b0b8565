"""Hugging Face `datasets` are held against the same images in folders."""

import pickle
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tokenpool.training.data import ImageFolderDataModule
from tokenpool.training.images import load_image, open_images
from tokenpool.training.recipe import Recipe

datasets = pytest.importorskip("datasets")

CLASSES = ["green", "red"]


@pytest.fixture(autouse=True)
def _cache_in_tmp_path(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of small images in ImageNet's layout, some of them JPEG, PNG, grey, or transparent."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 3)):
        for name in CLASSES:
            (tmp_path / "folder" / part / name).mkdir(parents=True)
            for index, (mode, suffix) in enumerate((("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("RGB", "webp"))):
                if index < count:
                    image = Image.fromarray(random.integers(0, 255, (40, 50, 4), dtype=np.uint8)).convert(mode)
                    image.save(tmp_path / "folder" / part / name / f"{index}.{suffix}")
    return tmp_path / "folder"


def samples(folder: Path, part: str) -> list[tuple[bytes, str, int]]:
    """Bytes, name and label of all images of a folder, in ImageFolder's order."""
    paths = [path for name in CLASSES for path in sorted((folder / part / name).iterdir())]
    return [(path.read_bytes(), path.name, CLASSES.index(path.parent.name)) for path in paths]


def table(content: list[tuple[bytes, str, int]], label: object = None) -> "datasets.Dataset":
    label = label or datasets.ClassLabel(names=CLASSES)
    images = [{"bytes": image, "path": name} for image, name, _ in content]
    return datasets.Dataset.from_dict(
        {"image": images, "label": [label for _, _, label in content]},
        datasets.Features({"image": datasets.Image(), "label": label}),
    )


def write_shard(path: Path, members: list[tuple[str, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, BytesIO(content))


def members(content: list[tuple[bytes, str, int]]) -> list[tuple[str, bytes]]:
    pairs = [
        ((f"{label}/{index}{Path(name).suffix}", image), (f"{label}/{index}.cls", f"{label}\n".encode()))
        for index, (image, name, label) in enumerate(content)
    ]
    return [member for pair in pairs for member in pair]


def saved(folder: Path, to: Path) -> str:
    content = {"train": table(samples(folder, "train")), "validation": table(samples(folder, "val"))}
    datasets.DatasetDict(content).save_to_disk(to)
    return f"hf:{to}"


def parquet(folder: Path, to: Path) -> str:
    (to / "data").mkdir(parents=True)
    for part, name in (("train", "train"), ("val", "validation"), ("val", "test")):  # test stands aside
        content = samples(folder, part) if name != "test" else samples(folder, part)[:1]
        for number, rows in enumerate((content[: len(content) // 2], content[len(content) // 2 :])):
            table(rows).to_parquet(to / "data" / f"{name}-{number:05}-of-00002.parquet")
    return f"hf:{to}"


def shards(folder: Path, to: Path) -> str:
    for part, name in (("train", "imagenet1k-train"), ("val", "imagenet1k-validation")):
        content = members(samples(folder, part))
        write_shard(to / f"{name}-0000.tar", content[:4])
        write_shard(to / f"{name}-0001.tar", content[4:])
    return f"hf:{to}"


def evaluated(root: str | Path, workers: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    data = ImageFolderDataModule(root, image_size=32, recipe=Recipe(batch_size=4), workers=workers)
    data.setup("fit")
    data.trainer = None
    batches = [*data.test_dataloader()]
    assert len(data.train_set) == 8 and data.num_classes == 2
    return tuple(torch.cat(part) for part in zip(*batches, strict=True))


@pytest.mark.parametrize("write", [saved, parquet, shards])
def test_the_same_images_as_in_a_folder(write, folder: Path, tmp_path: Path) -> None:
    images, labels = evaluated(folder)
    root = write(folder, tmp_path / "hub")
    for workers in (0, 2):
        again, labels_again = evaluated(root, workers)
        assert torch.equal(again, images) and torch.equal(labels_again, labels)
    opened = pickle.loads(pickle.dumps(open_images(root, "train")))  # as for workers that are not forked
    assert opened.classes == (["0", "1"] if write is shards else CLASSES)
    for index, (image, label) in enumerate(open_images(folder, "train")):
        there, label_there = opened[index]
        assert there.tobytes() == image.tobytes() and label_there == label


def test_folders(folder: Path) -> None:
    images = open_images(folder, "train")
    assert images.classes == CLASSES and images.labels.tolist() == [0] * 4 + [1] * 4
    assert images.name(5) == str(folder / "train" / "red" / "1.png")
    before = [images.stamp(index) for index in range(8)]
    Image.new("RGB", (3, 3)).save(folder / "train" / "red" / "1.png")
    assert [images.stamp(index) == stamp for index, stamp in enumerate(before)] == [index != 5 for index in range(8)]
    (folder / "val").rename(folder / "test")
    assert len(open_images(folder, "val")) == 6
    (folder / "train").rename(folder / "training")
    with pytest.raises(FileNotFoundError, match=r"no folder .*/train: expected ImageNet's layout"):
        open_images(folder, "train")
    with pytest.raises(ValueError, match=r"part = 'test' must be one of train, val"):
        open_images(folder, "test")


def test_names_that_are_not_ascii(folder: Path) -> None:
    (folder / "train" / "red" / "1.png").rename(folder / "train" / "red" / "Hühnchen – 鶏.png")
    names = [Path(name).name for name in map(open_images(folder, "train").name, range(8))]
    assert "Hühnchen – 鶏.png" in names


@pytest.mark.parametrize("write", [saved, parquet, shards])
def test_broken_images_are_named(write, folder: Path, tmp_path: Path) -> None:
    (folder / "val" / "red" / "0.jpg").write_bytes(b"no image")
    path = folder / "val" / "green" / "0.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    images = open_images(write(folder, tmp_path / "hub"), "val")
    with pytest.raises(ValueError, match=r"^cannot read image 3 of validation of hf:.*hub \(.*\.jpg\): Pillow does"):
        images[3]
    with pytest.raises(ValueError, match=r"^cannot read image 0 of validation of hf:.* truncated"):
        images[0]
    assert "3 of validation" in images.name(3) and images[4][1] == 1


def test_images_can_be_bytes_or_files(folder: Path) -> None:
    path = folder / "val" / "green" / "1.png"
    whole = load_image(path).tobytes()
    assert load_image(path.read_bytes()).tobytes() == whole
    with path.open("rb") as file:
        assert load_image(file, "one").tobytes() == whole
    with pytest.raises(ValueError, match="cannot read image one: it is empty"):
        load_image(b"", "one")


def test_columns(tmp_path: Path, folder: Path) -> None:
    content = samples(folder, "val")
    image, label = datasets.Image(), datasets.ClassLabel(names=CLASSES)

    def opened(columns: dict, features: dict) -> object:
        where = tmp_path / f"columns{len(list(tmp_path.iterdir()))}"
        rows = datasets.Dataset.from_dict(columns, datasets.Features(features))
        datasets.DatasetDict({"test": rows}).save_to_disk(where)
        return open_images(f"hf:{where}", "val")

    contents, numbers = [content[0][0], content[3][0]], datasets.Value("int32")
    images = opened({"img": contents, "cls": [1, 0]}, {"img": datasets.Value("binary"), "cls": numbers})
    assert images[0][0].tobytes() == load_image(contents[0]).tobytes() and images.classes == ["0", "1"]
    for columns, features, message in (
        (
            {"picture": contents, "label": [0, 1]},
            {"picture": image, "label": label},
            "columns picture, label, .* image or",
        ),
        ({"image": contents, "y": [0, 1]}, {"image": image, "y": label}, "columns image, y, expected one for labels"),
        (
            {"image": ["a", "b"], "label": [0, 1]},
            {"image": datasets.Value("string"), "label": label},
            "expected images",
        ),
        ({"image": contents, "label": [0, -1]}, {"image": image, "label": label}, r"label -1, expected 0\.\.1"),
        ({"image": contents, "label": [0, None]}, {"image": image, "label": label}, "image 1 of test .* has no label"),
        (
            {"image": contents, "label": [0, 2]},
            {"image": image, "label": numbers},
            r"2 labels in 0\.\.2, expected 0\.\.1",
        ),
        (
            {"image": contents, "label": ["a", "b"]},
            {"image": image, "label": datasets.Value("string")},
            "expected integ",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            opened(columns, features)
    with pytest.raises(ValueError, match="it has the splits test, expected train"):
        open_images(f"hf:{tmp_path / 'columns1'}", "train")


def test_shards_that_lack_something_are_named(folder: Path, tmp_path: Path) -> None:
    content = members(samples(folder, "val"))
    hub = tmp_path / "hub"
    shard = hub / "val-0.tar"
    for wrong, message in (
        (content[:3] + content[4:], r"val-0.tar/0/1 has png, expected one image"),
        ([*content[:12], ("late/x.json", b"{}"), ("late/x.cls", b"1")], r"late/x has cls, json, expected one image"),
        ([*content, ("z.jpg", b""), ("z.png", b""), ("z.cls", b"1")], r"/z has cls, jpg, png, expected one image"),
        ([*content, ("z.jpg", b""), ("z.cls", b"red")], r"z.cls holds b'red', expected the number of a class"),
    ):
        write_shard(shard, wrong)
        with pytest.raises(ValueError, match=message):
            open_images(f"hf:{hub}", "val")
    write_shard(shard, content)
    assert len(open_images(f"hf:{hub}", "val")) == 6
    whole = shard.read_bytes()
    second = whole.index(b"0/1.png")  # a header in the middle
    for damaged in (whole[:second], whole[: second + 700], whole[:second] + b"x" * 512 + whole[second + 512 :]):
        shard.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"cannot open hf:.*(val-0.tar is incomplete or damaged at byte|unexpected end)"
        ):
            open_images(f"hf:{hub}", "val")


def test_changed_shards_are_read_again(folder: Path, tmp_path: Path) -> None:
    content = members(samples(folder, "val"))
    write_shard(tmp_path / "hub" / "val-0.tar", content)
    before = open_images(f"hf:{tmp_path / 'hub'}", "val")
    write_shard(tmp_path / "hub" / "val-0.tar", [*content, ("more.png", content[2][1]), ("more.cls", b"1")])
    after = open_images(f"hf:{tmp_path / 'hub'}", "val")
    assert (len(before), len(after)) == (6, 7) and before.stamp(0) != after.stamp(0)


@pytest.mark.parametrize("name", ["train-val-0", "val_test-0", "0"])
def test_names_that_could_mean_two_parts_are_refused(name: str, folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    to = hub / "validation and train" if name == "0" else hub
    write_shard(to / f"{name}.tar", members(samples(folder, "val")))
    with pytest.raises(ValueError, match=f"{name}.tar could belong to .* or .*: rename '{name if to == hub else 'v'}"):
        open_images(f"hf:{hub}", "val")


def test_what_systems_leave_in_archives_is_no_image(folder: Path, tmp_path: Path) -> None:
    content = members(samples(folder, "val"))
    left = [member for name, image in content for member in ((f"./__MACOSX/{name}", b"x"), (f"._{name}", b"x"))]
    content = [(f"./{name}", image) for name, image in content]
    write_shard(tmp_path / "hub" / "val-0.tar", [*left, *content, ("0/._0.jpg", b"x"), (".DS_Store", b"x")])
    for name in ("._val-0.tar", ".cache/val-1.tar", "__MACOSX/val-2.tar"):
        write_shard(tmp_path / "hub" / name, [("x.txt", b"x")])
    assert open_images(f"hf:{tmp_path / 'hub'}", "val").labels.tolist() == [0] * 3 + [1] * 3


def test_missing_data_are_named(folder: Path, tmp_path: Path) -> None:
    root = parquet(folder, tmp_path / "hub")
    next((tmp_path / "hub").rglob("train-00001-*")).unlink()
    with pytest.raises(
        ValueError, match="1 of the 00002 files like train-00000-of-00002.parquet are missing: number 1"
    ):
        open_images(root, "train")
    table(samples(folder, "val")).save_to_disk(tmp_path / "single")
    for root, message in (
        (f"hf:{tmp_path / 'single'}", "it is a single Dataset, expected a DatasetDict"),
        (f"hf:{folder}", "it has no data: .* found train, val"),
        ("hf:./nowhere", "cannot open hf:./nowhere: no folder ./nowhere"),
        ("hf:ILSVRC/imagenet-1k", "cannot open hf:ILSVRC/imagenet-1k: "),  # there is no network
    ):
        with pytest.raises(ValueError, match=message):
            open_images(root, "val")


def test_the_package_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(RuntimeError, match=r'pip install "tokenpool\[datasets\]"'):
        open_images("hf:x", "val")
