import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.auto_augment import RandAugment

from tokenpool.data import DigitsDataModule, ImageFolderDataModule, shifted, training_transform
from tokenpool.images import load_image


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of small images in ImageNet's layout: green and red."""
    random = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name, channel in (("green", 1), ("red", 0)):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 90, (40, 50, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    return tmp_path


def test_digits() -> None:
    data = DigitsDataModule(split=3)
    data.setup()
    images, labels = data.train_set.tensors
    held_out, held_out_labels = data.test_set.tensors
    assert images.shape == (1347, 1, 16, 16) and held_out.shape == (450, 1, 16, 16)
    assert abs(images.mean()) < 1e-4 and abs(images.std() - 1) < 1e-4
    assert (labels.bincount() + held_out_labels.bincount()).tolist() == np.bincount(load_digits().target).tolist()
    assert held_out_labels.bincount().min() >= 43
    again, other = DigitsDataModule(split=3), DigitsDataModule(split=4)
    again.setup(), other.setup()
    assert torch.equal(again.test_set.tensors[0], held_out) and not torch.equal(other.test_set.tensors[0], held_out)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        data = DigitsDataModule(seed=seed)
        data.setup()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return [int(i) for batch in loader.batch_sampler for i in batch]

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2) and order(0, 1) != order(1, 1)
    assert sorted(order(0, 0))[-1] < 1347 and len(set(order(0, 0))) == len(order(0, 0)) == 1347 // 32 * 32


def test_shifted() -> None:
    image = torch.arange(9.0).view(1, 1, 3, 3).repeat(3, 2, 1, 1)
    moved = shifted(image, torch.tensor([[0, 0], [1, 0], [0, -2]]))
    assert torch.equal(moved[0], image[0])
    assert moved[1, 1].tolist() == [[0, 1, 2], [0, 1, 2], [3, 4, 5]]
    assert moved[2, 0].tolist() == [[2, 2, 2], [5, 5, 5], [8, 8, 8]]


def test_image_folder(folder: Path) -> None:
    data = ImageFolderDataModule(folder, image_size=32, batch_size=4, workers=0)
    data.setup("fit")
    assert data.num_classes == 2 and len(data.train_set) == 12 and len(data.test_set) == 6
    same = data.train_set[3][0]
    assert torch.equal(data.train_set[3][0], same) and not torch.equal(data.train_set[3 + 12][0], same)  # next epoch
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.float32
    batches = list(data.test_dataloader())
    images, labels = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal((images[:, 0].mean((1, 2)) > images[:, 1].mean((1, 2))).long(), labels)  # red is class 1


def test_augmentation_of_any_magnitude_is_possible() -> None:
    """RandAugment's magnitudes are normally distributed and cut at 10, where Pillow 13 refuses to posterise."""
    transform = training_transform(input_size=(3, 32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    augment = next(step for step in transform.transforms if isinstance(step, RandAugment))
    image = Image.new("RGB", (32, 32), "teal")
    assert len(augment.ops) == 15
    for operation in augment.ops:
        operation.prob, operation.magnitude, operation.magnitude_std = 1.0, 11, 0.0
        assert operation(image).size == (32, 32)


def test_processes_that_load_data_do_not_die_of_a_requeue(folder: Path) -> None:
    data = ImageFolderDataModule(folder, image_size=32, batch_size=2, workers=2)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches)
    for worker in loader._iterator._workers:
        os.kill(worker.pid, signal.SIGUSR1)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 5


def test_limit_is_spread_over_the_classes(folder: Path) -> None:
    data = ImageFolderDataModule(folder, image_size=32, limit=4, workers=0)
    data.setup("test")
    assert [label for _, label in data.test_set] == [0, 0, 1, 1]


def test_parts_are_interleaved_and_whole(folder: Path) -> None:
    seen = []
    for part in ("1/3", "2/3", "3/3"):
        data = ImageFolderDataModule(folder, image_size=32, part=part, workers=0)
        data.setup("test")
        seen.append([tuple(image.flatten()[:20].tolist()) for image, _ in data.test_set])
    data = ImageFolderDataModule(folder, image_size=32, workers=0)
    data.setup("test")
    assert [image for images in zip(*seen, strict=True) for image in images] == [
        tuple(image.flatten()[:20].tolist()) for image, _ in data.test_set
    ]
    for wrong in ("half", "0/2", "3/2", "1/", "-1/2"):
        with pytest.raises(ValueError, match=f"part = '{wrong}' must be like"):
            ImageFolderDataModule(folder, part=wrong)


def test_missing_and_empty_folders_are_named(folder: Path, tmp_path_factory) -> None:
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere/val: expected ImageNet's layout"):
        ImageFolderDataModule(folder / "nowhere").setup("test")
    empty = tmp_path_factory.mktemp("empty")
    (empty / "val").mkdir()
    with pytest.raises(FileNotFoundError, match="empty"):
        ImageFolderDataModule(empty).setup("test")
    (folder / "train" / "blue").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "train" / "blue" / "a.png")
    with pytest.raises(ValueError, match="the classes .* differ"):
        ImageFolderDataModule(folder).setup("fit")


def test_unreadable_images_are_named(folder: Path) -> None:
    whole = (folder / "val" / "red" / "0.png").read_bytes()
    for name, content in (("text", b"hello"), ("cut", whole[: len(whole) // 2]), ("empty", b"")):
        path = folder / f"{name}.png"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"cannot read image .*{name}\.png"):
            load_image(path)
    (folder / "val" / "red" / "1.png").write_bytes(b"no image")
    data = ImageFolderDataModule(folder, image_size=32, workers=0)
    data.setup("test")
    with pytest.raises(ValueError, match=r"cannot read image .*red/1\.png"):
        list(data.test_dataloader())


def test_grey_and_transparent_images_become_rgb(tmp_path: Path) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        Image.new(mode, (9, 7)).save(tmp_path / f"{mode}.png")
        assert load_image(tmp_path / f"{mode}.png").mode == "RGB"


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(load_image(tmp_path / "deep.png"))[..., 0] - values / 257).max() <= 1
    Image.fromarray(values.astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match=r"float.tiff: its values are floating-point"):
        load_image(tmp_path / "float.tiff")
    Image.fromarray((values // 257).astype(np.int32)).save(tmp_path / "wide.tiff")  # 8 bits in 32
    assert np.asarray(load_image(tmp_path / "wide.tiff"))[-1, -1].tolist() == [255] * 3
    Image.fromarray(values.astype(np.int32) * 9).save(tmp_path / "wider.tiff")
    with pytest.raises(ValueError, match=r"its values lie in 0..589815; expected 8 or 16 bits"):
        load_image(tmp_path / "wider.tiff")


def test_images_that_fill_the_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (2000, 2000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(ValueError, match=r"huge.png has more than 2 million pixels: scale it down first"):
        load_image(tmp_path / "huge.png")
