"""Stored images are held against the same images decoded and resized by timm each time."""

import errno
import io
import multiprocessing
import os
import pickle
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tokenpool import files
from tokenpool.training import stored
from tokenpool.training.data import ImageFolderDataModule
from tokenpool.training.images import open_images
from tokenpool.training.recipe import Recipe
from tokenpool.training.stored import StoredImageDataModule, StoredImages


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENPOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of small photographs in CIFAR's layout, taller than wide."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 4)):
        for name in ("a", "b"):
            (tmp_path / "folder" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 255, (40, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "folder" / part / name / f"{index}.jpg")
    return tmp_path / "folder"


def opened(folder: Path, stage: str = "fit", **options) -> StoredImageDataModule:
    data = StoredImageDataModule(folder, image_size=32, workers=0, **options)
    data.setup(stage)
    return data


def written(cache: Path) -> list[Path]:
    return sorted((cache / "images").glob("*.npy"))


@pytest.mark.parametrize(
    "options", [{}, {"crop_pct": 1.0}, {"limit": 5}, {"part": "2/3"}, {"recipe": Recipe(test_per_class=3)}]
)
def test_evaluation_sees_what_timm_makes_each_time(folder: Path, options: dict) -> None:
    reference = ImageFolderDataModule(folder, image_size=32, workers=0, **options)
    reference.setup("test")
    found, expected = opened(folder, "test", **options).test_set, reference.test_set
    assert len(found) == len(expected) > 0
    for (image, label), (other, other_label) in zip(found, expected, strict=True):
        assert torch.equal(image, other) and label == other_label


def test_images_are_decoded_once(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder, recipe=Recipe(train_per_class=5))
    assert len(first.train_set) == 10 and [path.suffix for path in written(cache)] == [".npy"] * 2
    images = [image for image, _ in first.train_set]
    decode = stored.load_image
    monkeypatch.setattr(stored, "load_image", lambda *source: pytest.fail(f"decodes {source}"))
    again = opened(folder, recipe=Recipe(train_per_class=5))
    assert all(torch.equal(*pair) for pair in zip((image for image, _ in again.train_set), images, strict=True))
    opened(folder, "test", limit=2)  # a part of what is stored already
    monkeypatch.setattr(stored, "load_image", decode)
    Image.new("RGB", (40, 30)).save(folder / "train" / "b" / "2.jpg")
    changed = opened(folder, recipe=Recipe(train_per_class=5))
    assert [torch.equal(*pair) for pair in zip((image for image, _ in changed.train_set), images, strict=True)] == [
        index != 7 for index in range(10)
    ]
    opened(folder, recipe=Recipe(train_per_class=5, crop_pct=1.0))
    assert len(written(cache)) == 5 and not list(cache.rglob(".*.partial"))
    copy = pickle.dumps(first.train_set)  # for a process that is not forked: without the pixels
    assert len(copy) < 10 * 32 * 32 and torch.equal(pickle.loads(copy)[3][0], images[3])


def test_two_processes_store_once(folder: Path, cache: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=opened, args=(folder,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0] and len(written(cache)) == 2
    opened(folder)


def test_nothing_half_written_is_ever_used(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.FileIO):
        """A disk that is full after the file's header."""

        def write(self, content: bytes) -> int:
            if self.tell():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    monkeypatch.setattr(stored, "open", Full, raising=False)
    with pytest.raises(OSError, match=r"^cannot write .*npy: .*No space left on device; the file does not exist$"):
        opened(folder)
    monkeypatch.undo()
    monkeypatch.setenv("TOKENPOOL_CACHE", str(cache))
    assert written(cache) == [] and not list(cache.rglob(".*.partial"))
    usage = namedtuple("Usage", "free")
    monkeypatch.setattr(stored.shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(OSError, match=r"^12 images take 0.0 GiB, but .* free: set \$TOKENPOOL_CACHE to a folder on"):
        opened(folder)
    monkeypatch.undo()
    monkeypatch.setenv("TOKENPOOL_CACHE", str(cache))
    broken = folder / "train" / "b" / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"^cannot read image .*train/b/3.jpg: .*truncated"):
        opened(folder)
    broken.unlink()
    opened(folder)
    for path in written(cache):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"npy is damaged .*delete it, and it will be created again"):
        opened(folder)
    images = open_images(folder, "train")
    np.save(cache / "x.npy", np.zeros((3, 3, 32, 32), np.uint8))
    with pytest.raises(ValueError, match="x.npy does not hold 11 images"):
        StoredImages(cache / "x.npy", images.labels, (0.5,), (0.5,))


def test_too_few_images_of_a_class_are_named(folder: Path) -> None:
    (folder / "train" / "b" / "3.jpg").unlink()
    with pytest.raises(ValueError, match="^train of .*folder: expected 6 images of each class, but b has 5$"):
        opened(folder, recipe=Recipe(train_per_class=6))
    with pytest.raises(ValueError, match="^val of .*: expected 9 images of each class, but a has 4, b has 4$"):
        opened(folder, "test", recipe=Recipe(test_per_class=9))
    plain = ImageFolderDataModule(folder, image_size=32, workers=0, recipe=Recipe(train_per_class=6))
    with pytest.raises(ValueError, match="expected 6 images of each class, but b has 5"):
        plain.setup("fit")
    (folder / "train" / "b").rename(folder / "train" / "c")
    with pytest.raises(ValueError, match="train and val of .* must have the same classes"):
        opened(folder)


def augmented(data: StoredImageDataModule, images: torch.Tensor, step: int) -> torch.Tensor:
    """The images as training gets them at that step."""
    progress = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=1)))
    data.trainer = SimpleNamespace(
        training=True,
        accumulate_grad_batches=1,
        global_step=step,
        fit_loop=SimpleNamespace(epoch_loop=progress),
        global_rank=0,
        world_size=1,
    )
    return data.on_after_batch_transfer((images, torch.zeros(len(images), dtype=torch.long)), 0)[0]


def test_augmentation_flips_and_shifts_and_depends_on_seed_and_step_alone(folder: Path) -> None:
    data = opened(folder)
    images = torch.stack([image for image, _ in data.train_set]).repeat(20, 1, 1, 1)
    found = augmented(data, images, step=3)
    assert torch.equal(augmented(data, images, step=3), found)
    assert not torch.equal(augmented(data, images, step=4), found)
    assert not torch.equal(augmented(opened(folder, seed=1), images, step=3), found)
    seen = set()
    for image, result in zip(images, found, strict=True):
        centre = result[:, 4:-4, 4:-4]
        where = [
            (flipped, down, right)
            for flipped, source in enumerate((image, image.flip(-1)))
            for down in range(-4, 5)
            for right in range(-4, 5)
            if torch.equal(source[:, 4 - down : 28 - down, 4 - right : 28 - right], centre)
        ]
        assert len(where) == 1
        seen |= set(where)
    assert {flipped for flipped, *_ in seen} == {0, 1} and {down for _, down, _ in seen} == set(range(-4, 5))


def test_the_cache_is_where_the_system_wants_it(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    assert files.cache_folder() == cache
    monkeypatch.delenv("TOKENPOOL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "tokenpool"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "tokenpool"
