"""The order of classes is held against timm's, and ImageNet's classes against timm's list of them."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from timm.data.readers.reader_image_folder import find_images_and_targets

import tokenpool
from tokenpool.analysis import results
from tokenpool.runs import checks, execute
from tokenpool.runs.measure import MEASURES, measure_agreement
from tokenpool.runs.run import Run, weights_path
from tokenpool.training.data import ImageFolderDataModule
from tokenpool.training.images import open_images
from tokenpool.training.labels import outputs_of
from tokenpool.training.recipe import Recipe

WNIDS = ImageNetInfo().label_names()
SOME = [WNIDS[index] for index in (3, 250, 251, 998)]
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}


def draw(root: Path, classes: list[str], count: int = 3) -> Path:
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = Image.fromarray(random.integers(0, 255, (9, 12, 3), dtype=np.uint8)).resize((48, 36))
                pixels.save(root / part / name / f"{index}.png")
    return root


def weights(path: Path, **options) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", **TINY | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    tokenpool.save(model, path)
    return path


def test_folders_are_numbered_as_timm_numbers_them(tmp_path: Path) -> None:
    names = ["10", "9", "1", "2", "0", "B1", "a", "b10", "b2", "Ä"]
    folder = draw(tmp_path, names, count=1) / "val"
    found, numbers = find_images_and_targets(str(folder))
    images = open_images(tmp_path, "val")
    assert images.classes == sorted(numbers, key=numbers.get) and images.classes[:4] == ["0", "1", "2", "9"]
    assert {images.name(index): label for index, label in enumerate(images.labels.tolist())} == dict(found)
    assert images.labels.tolist() == sorted(images.labels.tolist())


def test_names_that_are_equal_but_for_their_case_have_one_order(tmp_path: Path, monkeypatch) -> None:
    draw(tmp_path, ["b", "a", "01", "B", "1"], count=1)
    listed, orders = os.scandir, []
    for backwards in (False, True):
        monkeypatch.setattr(os, "scandir", lambda path, backwards=backwards: _Listing(listed(path), backwards))
        orders.append(open_images(tmp_path, "val").classes)
    assert orders[0] == orders[1] == ["01", "1", "a", "B", "b"]


class _Listing(list):
    """What `os.scandir` gives, in an order that the file system is free to choose."""

    def __init__(self, entries: object, backwards: bool) -> None:
        super().__init__(sorted(entries, key=lambda entry: entry.name, reverse=backwards))

    def __enter__(self) -> "_Listing":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __next__(self) -> os.DirEntry:  # what os.walk asks for
        if not self:
            raise StopIteration
        return self.pop(0)

    def close(self) -> None:
        pass


def test_imagenet_decides_by_wordnet_ids() -> None:
    assert outputs_of(WNIDS, 1000) is None
    assert outputs_of(SOME, 1000) == [3, 250, 251, 998]
    assert outputs_of(WNIDS[::-1], 1000) == list(range(999, -1, -1))  # a data set that has an order of its own
    assert outputs_of(SOME, 4) is None and outputs_of(WNIDS[:100], 100) is None  # a model of its own for them
    large = ImageNetInfo("imagenet-21k-goog").label_names()
    assert [large[index] for index in outputs_of(SOME, 21843)] == SOME
    assert outputs_of([f"class {index}" for index in range(1000)], 1000) is None
    another = [name for name in large if name not in WNIDS][:1000]
    assert outputs_of(another, 1000) is None
    for classes, count, message in (
        (["cat", "dog"], 1000, "the data have 2 classes, but the model has 1000$"),
        (["cat", *SOME], 1000, "the data have 5 classes, but the model has 1000$"),
        ([*SOME, "n00000001"], 1000, "5 classes, but the model has 1000; 1 classes of .* are not in .*: n00000001$"),
        ([*WNIDS[1:], "n00000001"], 1000, "1 classes of the data are not in the ImageNet with 1000 classes: n0000"),
        (SOME, 100, "the data have 4 classes, but the model has 100$"),
    ):
        with pytest.raises(ValueError, match=message):
            outputs_of(classes, count)


def test_a_part_of_imagenet_is_measured_among_its_classes(tmp_path: Path) -> None:
    folder, path = draw(tmp_path / "images", SOME, count=10), weights(tmp_path / "weights.safetensors")
    run = Run("evaluate", "x", str(folder), "deit_tiny_patch16_224", start=str(path), model_options=TINY, limit=33)
    checks.check_data([run])
    outcome = execute.execute(run, tmp_path)
    data = ImageFolderDataModule(folder, image_size=32, limit=33, workers=0)
    data.setup("test")
    images, labels = (torch.stack(list(map(torch.as_tensor, part))) for part in zip(*data.test_set, strict=True))
    model = tokenpool.load(path)
    with torch.inference_mode():
        logits = model(images)[:, [3, 250, 251, 998]]
    correct = (logits.argmax(1) == labels).float().mean().item()
    assert outcome["metrics"]["top1"] == pytest.approx(100 * correct) and outcome["metrics"]["top5"] == 100
    assert outcome["metrics"]["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert outcome["among_classes"] == [3, 250, 251, 998]
    assert "warning" in outcome  # weights are random

    agreement = measure_agreement(tokenpool.patch(model, "power_bert", [9, 4]), data)
    with torch.inference_mode():
        pooled = model(images)[:, [3, 250, 251, 998]].log_softmax(1)
    assert agreement["correct"] == (pooled.argmax(1) == labels).int().tolist()
    expected = F.kl_div(pooled, logits.log_softmax(1), log_target=True, reduction="none").sum(1)
    assert agreement["divergences"] == pytest.approx(expected.tolist(), abs=2e-5)


@pytest.mark.slow
def test_training_on_a_part_of_imagenet_maps_as_its_evaluation(tmp_path: Path) -> None:
    folder = draw(tmp_path / "images", SOME, count=2)
    options = TINY | {"num_classes": 1000}
    setting = {"data": str(folder), "model": "deit_tiny_patch16_224", "model_options": options}
    run = Run("train", "x", **setting, recipe=Recipe(epochs=2, batch_size=8, mixup=0.1))
    trained = execute.execute(run, tmp_path)
    path = weights_path(run.name, tmp_path)
    assert trained["among_classes"] == [3, 250, 251, 998] and trained["epochs"][0]["train_loss"] < 3  # not log 1000
    outcome = execute.execute(Run("evaluate", "y", **setting, start=str(path)), tmp_path)
    assert outcome["metrics"]["loss"] == pytest.approx(trained["metrics"]["loss"], rel=1e-4)
    setting |= {"model_options": TINY | {"num_classes": 4}, "recipe": Recipe(epochs=1, batch_size=8)}
    own = Run("train", "own", **setting)
    assert "among_classes" not in execute.execute(own, tmp_path)


def test_hugging_face_names_of_classes(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=SOME[::-1])
    rows = {"image": [{"bytes": b"", "path": None}] * 4, "label": [0, 1, 2, 3]}
    rows = datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "label": label}))
    datasets.DatasetDict({"validation": rows}).save_to_disk(tmp_path / "hub")
    images = open_images(f"hf:{tmp_path / 'hub'}", "val")
    assert images.classes == SOME[::-1] and outputs_of(images.classes, 1000) == [998, 251, 250, 3]


@pytest.mark.parametrize("shift", [0, 5])
@pytest.mark.slow
def test_photographs_with_labels_that_are_wrong(shared: Path, tmp_path: Path, in_process, shift: int) -> None:
    """A trained model is warned of if labels are shifted, and not if they are right."""
    source = shared / "data" / "imagenet_sample" / "val"
    (tmp_path / "val").mkdir()
    for index in range(0, 1000, 25):
        (tmp_path / "val" / WNIDS[index]).symlink_to(source / WNIDS[index + shift])
    path = shared / "data" / "deit_tiny_patch16_224.safetensors"
    done = in_process(
        "evaluate",
        "--model=deit_tiny_patch16_224",
        f"--data={tmp_path}",
        f"--weights={path}",
        f"--output={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    outcome = results.read(next((tmp_path / "out").glob("*.json")))
    assert ", among 40 of the model's classes; " in done.stdout and len(outcome["among_classes"]) == 40
    warned = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    if not shift:
        assert outcome["metrics"]["top1"] > 80 and warned == [] and "warning" not in outcome
    else:
        assert outcome["metrics"]["top1"] < 20 and len(warned) == 1
        assert "another order" in warned[0] and "preprocess" in warned[0] and "no head" in warned[0]


@pytest.mark.parametrize(
    "metrics, changes, warned",
    [
        ({"top1": 14.0, "images": 500}, {}, True),
        ({"top1": 14.2, "images": 500}, {}, False),
        ({"top1": 30.0, "images": 500, "loss": 8.5}, {}, True),  # some classes are right
        ({"top1": 30.0, "images": 500, "loss": None}, {}, False),
        ({"top1": 12.0, "images": 500, "loss": 2.0}, {"start": "base-seed0"}, False),  # an own base model
        ({"top1": 0.0, "images": 10}, {}, False),  # too few images
        ({"gaussian_difference": 0.1, "images": 500}, {}, False),
    ],
)
def test_what_is_no_better_than_a_guess(
    metrics: dict, changes: dict, warned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among ten classes; the metrics are given, as the weights' need not be measured here."""
    size = {"embed_dim": 8, "depth": 2, "num_heads": 2, "patch_size": 4}
    model = tokenpool.create_model("deit_digits_patch2_16", **size)
    for path in (tmp_path / "weights.safetensors", weights_path("base-seed0", tmp_path)):
        execute.save_weights(model, path)
    monkeypatch.setitem(MEASURES, "evaluate", lambda model, data: metrics)
    run = Run("evaluate", "x", "digits", "deit_digits_patch2_16", model_options=size)
    run = replace(run, **{"start": str(tmp_path / "weights.safetensors")} | changes)
    assert ("warning" in execute.execute(run, tmp_path)) == warned
