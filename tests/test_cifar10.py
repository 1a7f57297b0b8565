"""CIFAR-10 as torchvision, as a folder and as Hugging Face datasets give it: the same classes, images and lists."""

import dataclasses
import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

from experiments import presets
from experiments.slurm import submit
from tokenpool.runs import checks, data_sets
from tokenpool.runs.run import Run
from tokenpool.runs.study import Study
from tokenpool.training.images import first_of_each_class, is_downloaded, open_images
from tokenpool.training.recipe import Recipe
from tokenpool.training.stored import StoredImageDataModule

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six batches of thirty images in CIFAR-10's own layout, with their checksums; downloads fail."""
    monkeypatch.setenv("TOKENPOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cache" / "cifar10" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: dict) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch(name: str) -> list[str]:
        labels = random.permutation(np.arange(30) % 10).tolist()
        pixels = random.integers(0, 255, (30, 3072), dtype=np.uint8)
        return [name, write(name, {"data": pixels, "labels": labels})]

    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{number}") for number in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch")])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": write("batches.meta", {"label_names": NAMES})})
    monkeypatch.setattr(CIFAR10, "url", "file:///nowhere/cifar-10-python.tar.gz")
    return folder


def write_folder(folder: Path) -> None:
    """The same images as files, each class numbered in the order of the original, as its copies on the web are."""
    for part, name in (("train", "train"), ("val", "test")):
        images = open_images("cifar10", part)
        for label in range(10):
            place = folder / name / NAMES[label]
            place.mkdir(parents=True)
            for number, index in enumerate(np.flatnonzero(images.labels == label)):
                images[index][0].save(place / f"{number:04}.png")


def test_all_sources_give_the_same_lists(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "folder")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")

    def split(part: str) -> "datasets.Dataset":
        """With the columns of uoft-cs/cifar10."""
        images = open_images("cifar10", part)
        features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
        content = [{"bytes": images.source(index)[0], "path": None} for index in range(len(images))]
        return datasets.Dataset.from_dict({"img": content, "label": images.labels.tolist()}, features)

    datasets.DatasetDict({"train": split("train"), "test": split("val")}).save_to_disk(tmp_path / "hf")
    found = []
    for root in ("cifar10", tmp_path / "folder", f"hf:{tmp_path / 'hf'}"):
        for part, count in (("train", 12), ("val", 3)):
            images = open_images(root, part)
            assert images.classes == NAMES
            chosen = first_of_each_class(images, count, "x")
            assert np.bincount(images.labels[chosen]).tolist() == [count] * 10
            lists = [[images[index][0].tobytes() for index in chosen if images.labels[index] == n] for n in range(10)]
            found.append((part, lists))
    assert found[0::2] == [found[0]] * 3 and found[1::2] == [found[1]] * 3


def test_pixels_are_the_originals(downloaded: Path) -> None:
    batch = pickle.loads((downloaded / "data_batch_2").read_bytes())
    images = open_images("cifar10", "train")
    image, label = images[33]  # the fourth of the second batch
    assert label == batch["labels"][3] and images.name(33) == "33 of train of CIFAR-10"
    assert np.array_equal(np.asarray(image), batch["data"][3].reshape(3, 32, 32).transpose(1, 2, 0))
    with Image.open(io.BytesIO(images.source(33)[0])) as again:
        assert again.tobytes() == image.tobytes()
    assert len({images.stamp(index) for index in range(150)}) == 150


def test_it_trains(downloaded: Path) -> None:
    data = StoredImageDataModule("cifar10", image_size=16, recipe=Recipe(batch_size=20, train_per_class=4), workers=0)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (20, 3, 16, 16) and images.dtype == torch.float32 and len(data.train_set) == 40
    assert data.num_classes == 10 and labels.max() < 10


def test_the_name_reaches_the_cluster(downloaded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data_sets.DATA, "cifar10")
    study = Study(presets.get("cifar10_128"), tmp_path / "study")
    list(submit.submit(study, study.evaluations(["none"], carry=False), dry_run=True))
    (script,) = (study.folder / "slurm" / "scripts").glob("*-base-1.sh")
    assert "export TOKENPOOL_DATA=cifar10\n" in script.read_text()
    run = Run(
        "base", "", "cifar10", "deit_tiny_patch16_224", recipe=Recipe(epochs=1), model_options={"num_classes": 10}
    )
    checks.check_data([run])
    with pytest.raises(ValueError, match="train of cifar10 has 10 classes, but the model of base-seed0 has 7"):
        checks.check_data([dataclasses.replace(run, model_options={"num_classes": 7})])


def test_what_cannot_be_downloaded_is_named(downloaded: Path, tmp_path: Path) -> None:
    half = downloaded / "data_batch_4"
    half.write_bytes(half.read_bytes()[:1000])  # torchvision sees it by the checksum, and wants to download again
    with pytest.raises(ValueError, match=r"^cannot download CIFAR-10 into .*cifar10 \(.*: give --data a folder"):
        open_images("cifar10", "train")
    assert is_downloaded("cifar10") and not is_downloaded("cifar100")
    (tmp_path / "cifar10" / "train" / "a").mkdir(parents=True)
    Image.new("RGB", (3, 3)).save(tmp_path / "cifar10" / "train" / "a" / "0.png")
    assert not is_downloaded("cifar10")  # a folder of that name goes first
    assert open_images("cifar10", "train").classes == ["a"]
