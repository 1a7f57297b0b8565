import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.data.auto_augment import RandAugment

import tokenpool
from tokenpool.training.data import DigitsDataModule, ImageFolderDataModule, shifted, training_transform
from tokenpool.training.images import load_image, open_images
from tokenpool.training.recipe import Recipe


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
    data = ImageFolderDataModule(folder, image_size=32, recipe=Recipe(batch_size=4), workers=0)
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
    data = ImageFolderDataModule(folder, image_size=32, recipe=Recipe(batch_size=2), workers=2)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = iter(loader)
    next(batches), next(batches)  # one of each worker, so that both have begun
    for worker in loader._iterator._workers:
        os.kill(worker.pid, signal.SIGUSR1)
        os.kill(worker.pid, signal.SIGTERM)
    assert len(list(batches)) == 4


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
    with pytest.raises(ValueError, match="must have the same classes"):
        ImageFolderDataModule(folder).setup("fit")


def test_what_is_no_class_and_no_image(folder: Path, tmp_path_factory) -> None:
    def listed() -> list[tuple[str, int]]:
        images = open_images(folder, "val")
        return [(images.name(index), label) for index, label in enumerate(images.labels.tolist())]

    before = listed()
    image = (folder / "val" / "red" / "0.png").read_bytes()
    for name in (
        ".ipynb_checkpoints/0.png",
        "__MACOSX/red/._0.png",
        "@eaDir/0.png",
        "red/._0.png",
        "red/.thumbnails/0.png",
        "red/@eaDir/0.png/SYNO.png",
    ):
        (folder / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "val" / name).write_bytes(image)
    for name in (".DS_Store", "Thumbs.db", "red/.DS_Store", "red/Thumbs.db"):
        (folder / "val" / name).write_bytes(b"x")
    assert listed() == before

    (folder / "val" / "red" / "deep").mkdir()
    (folder / "val" / "red" / "deep" / "9.PNG").write_bytes(image)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    shutil.move(folder / "val" / "green", elsewhere / "green")
    (folder / "val" / "green").symlink_to(elsewhere / "green")
    assert listed() == [*before, (str(folder / "val" / "red" / "deep" / "9.PNG"), 1)]
    (folder / "val" / "red" / "deep" / "again").symlink_to(folder / "val" / "red")
    with pytest.raises(ValueError, match="red/deep/again is a link to a folder that contains the link"):
        listed()
    (folder / "val" / "red" / "deep" / "again").unlink()
    shutil.rmtree(elsewhere)
    with pytest.raises(ValueError, match="val/green is a link to .*green, which does not exist"):
        listed()


def test_images_without_a_class_are_named(folder: Path) -> None:
    image = (folder / "val" / "red" / "0.png").read_bytes()
    (folder / "val" / "more.png").write_bytes(image)
    with pytest.raises(ValueError, match=r"1 images \(more.png\) are directly in .*val .*/val/<class>/<image>\.$"):
        open_images(folder, "val")
    flat = folder / "flat" / "val"
    flat.mkdir(parents=True)
    for index in range(1, 12):
        (flat / f"ILSVRC2012_val_{index:08}.JPEG").write_bytes(image)
    with pytest.raises(ValueError, match=r"11 images \(ILSVRC.*001.JPEG, .*\.\.\.\) .* torchvision.datasets.ImageNet"):
        open_images(folder / "flat", "val")


def test_empty_classes_can_be_allowed(folder: Path) -> None:
    for part in ("train", "val"):
        (folder / part / "blue").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 class folders in .*val hold no image .*: blue\."):
        ImageFolderDataModule(folder, image_size=32).setup("fit")
    data = ImageFolderDataModule(folder, image_size=32, workers=0, allow_empty=True)
    data.setup("fit")
    assert list(data.classes) == ["blue", "green", "red"] and {label for _, label in data.test_set} == {1, 2}
    shutil.rmtree(folder / "val" / "red"), shutil.rmtree(folder / "val" / "green")
    with pytest.raises(FileNotFoundError, match="1 of the 1 class folders"):
        open_images(folder, "val", allow_empty=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_images_can_be_allowed(folder: Path, workers: int) -> None:
    path = folder / "val" / "red" / "1.jpg"
    Image.open(folder / "val" / "red" / "1.png").save(path)
    whole = np.asarray(load_image(path))
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ValueError, match=r"cannot read image .*1\.jpg: .*truncated"):
        load_image(path)
    assert np.array_equal(np.asarray(load_image(path, allow_truncated=True)), whole)
    data = ImageFolderDataModule(folder, image_size=32, workers=workers, allow_truncated=True)
    data.setup("test")
    assert sum(len(labels) for _, labels in data.test_dataloader()) == 7
    with pytest.raises(ValueError, match=r"1\.jpg: .*truncated"):  # the switch is for that call alone
        load_image(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read image .*1\.jpg: it is empty"):
        load_image(path, allow_truncated=True)


@pytest.mark.parametrize("url", ["https://host/images", "s3://bucket/x", "file:///data/images"])
def test_urls_are_refused_as_they_were_given(url: str, small: torch.nn.Module, in_process) -> None:
    message = f"{url} is a URL, expected a path: download the data first"
    for call in (
        lambda: open_images(url, "val"),
        lambda: open_images(Path(url), "val"),
        lambda: tokenpool.load_weights(small, Path(url)),
        lambda: tokenpool.load(url),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            call()
    model = "--model=deit_tiny_patch16_224"
    for arguments in (
        ["evaluate", model, f"--data={url}", "--pretrained"],
        ["evaluate", model, "--data=digits", f"--weights={url}"],
        ["train", f"--start={url}", "--epochs=1"],
        ["check-data", f"--data={url}"],
        ["figure", "9", "--preset=pretrained", f"--data={url}"],
        ["figure", "9", "--preset=pretrained", f"--weights={url}"],
        ["explain", url],
        ["explain", str(Path(__file__).parents[1] / "results/digits/pareto.png"), f"--weights={url}"],
    ):
        assert f"error: {message}" in in_process(*arguments).stderr, arguments


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
    with pytest.raises(ValueError, match=r"its values are in 0..589815, expected 8 or 16 bits"):
        load_image(tmp_path / "wider.tiff")


def test_images_that_fill_the_memory_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (2000, 2000)).save(tmp_path / "huge.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(ValueError, match=r"huge.png has more than 2 million pixels: scale it down first"):
        load_image(tmp_path / "huge.png")
