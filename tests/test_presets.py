import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed

import tokenpool
from experiments import artifacts, presets
from experiments.artifacts import everything, needs, status
from tokenpool.analysis import bits, results
from tokenpool.runs import data_sets, execute
from tokenpool.runs.run import WEIGHTS, result_path, weights_path
from tokenpool.runs.stages import placements
from tokenpool.runs.study import Study
from tokenpool.training.recipe import Recipe

SELECTIONS = ("random", "importance", "power_bert")
CLUSTERINGS = ("kmeans", "kmedoids", "wkmeans", "wkmedoids")
RESULTS = Path(__file__).parents[1] / "results"
SMALL = {"img_size": 32, "embed_dim": 24, "depth": 3, "num_heads": 2}


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Forty training and twenty test images of ten classes, in CIFAR-10's layout."""
    random = np.random.default_rng(0)
    for part, count in (("train", 4), ("test", 2)):
        for name in range(10):
            folder = tmp_path / "images" / part / f"class{name}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    monkeypatch.setenv(data_sets.DATA, str(tmp_path / "images"))
    return tmp_path / "images"


@pytest.mark.slow
def test_cifar10_fine_tunes_a_pretrained_model(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base model, search and fine-tuning in small, from weights for 1000 classes."""
    pretrained = timm.create_model("deit_tiny_patch16_224", **SMALL)
    tokenpool.save(pretrained, tmp_path / "pretrained.safetensors")
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "pretrained.safetensors"))
    preset = presets.get("cifar10")
    preset = dataclasses.replace(
        preset,
        model_options=preset.model_options | SMALL,
        depth=3,
        grid=2,
        base_epochs=1,
        search_epochs=1,
        finetune_epochs=1,
        recipe=dataclasses.replace(preset.recipe, learning_rate=1e-6, final_learning_rate=0.0),
        search_learning_rate=1e-6,
        retention_learning_rate=0.5,
        full_penalties=(1.0,),
        clustered_level=0,
    )
    folder = tmp_path / "runs"
    study = Study(preset, folder)
    (base,), (search,) = study.prerequisites(needs(study, "figure 5a"))
    assert base.pretrained and base.model_options["num_classes"] == 10 and search.start == base.name
    execute.execute(base, folder)
    # At so low a learning rate the weights are still those of the pretrained model; the classifier is another one.
    trained = load_file(weights_path(base.name, folder))
    start = pretrained.state_dict()["blocks.0.attn.qkv.weight"]
    assert trained["blocks.0.attn.qkv.weight"].sub(start).abs().max() < 1e-4 and trained["head.weight"].shape[0] == 10
    execute.execute(search, folder)
    study = Study(preset, folder)
    runs = [run for run in study.missing(needs(study, "figure 5a")) if run.downsampler == "wkmedoids"]
    learned = results.read(result_path(search, folder))["metrics"]["learned_keep"]
    assert [run.keep for run in runs] == [tuple(learned)]
    outcome = execute.execute(runs[0], folder)
    assert outcome["metrics"]["images"] == 20 and outcome["setting"]["trainer_options"]["precision"] == "bf16-mixed"
    assert str(tmp_path) not in result_path(runs[0], folder).read_text()


@pytest.mark.slow
def test_cifar10_128_starts_from_weights_for_larger_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Base model and plain fine-tuning in small, on lists of images that are stored once."""
    pretrained = timm.create_model("deit_tiny_patch16_224", **SMALL | {"img_size": 48})
    tokenpool.save(pretrained, tmp_path / "pretrained.safetensors")
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "pretrained.safetensors"))
    monkeypatch.setenv("TOKENPOOL_CACHE", str(tmp_path / "cache"))
    preset, folder = presets.get("cifar10_128"), tmp_path / "runs"
    recipe = dataclasses.replace(preset.recipe, train_per_class=3, test_per_class=2, learning_rate=2e-6)
    changes = {"depth": 3, "grid": 2, "recipe": recipe}
    study = Study(dataclasses.replace(preset, model_options=preset.model_options | SMALL, **changes), folder)
    tuned = study.plain([0])[0]
    for run in study.missing([tuned]):
        outcome = execute.execute(run, folder)
        correct = bits.decode(outcome["metrics"]["correct"], 20)
        assert outcome["metrics"]["top1"] == 100 * (correct.sum() / 20) and run.recipe.epochs == 2
    assert outcome["setting"]["start"] == "base-seed0" and outcome["training_images_per_second"] > 0
    assert len(list((tmp_path / "cache" / "images").glob("*.npy"))) == 2  # 30 and 20 images, for both runs
    expected = resample_abs_pos_embed(pretrained.pos_embed, [2, 2])
    found = load_file(weights_path("base-seed0", folder))["pos_embed"]
    assert torch.allclose(found, expected, atol=1e-4)


def test_cifar10_128_has_what_the_paper_compares() -> None:
    study = Study(presets.get("cifar10_128"), Path("nowhere"))
    runs = everything(study)
    rivals = study.preset.rivals
    tuned = Counter(
        (run.downsampler, run.seed)
        for run in runs
        if run.stage == "finetune" and not run.options and not run.carry and run.downsampler not in rivals
    )
    methods = (*SELECTIONS, *CLUSTERINGS)
    assert tuned == {(method, seed): 1 if method == "none" else 5 for method in ("none", *methods) for seed in range(3)}
    others = Counter(run.downsampler for run in runs if run.stage == "finetune" and run.options)
    assert others == {"kmedoids": 5, "wkmedoids": 5, "convolution": len(study.placements), "hvt": 3}  # random centres
    for carry, compared in ((False, methods), (True, CLUSTERINGS)):
        found = {run.downsampler for run in runs if run.stage == "evaluate" and run.carry == carry}
        assert found >= {"convolution", *compared}
    assert set(study.placements) <= set(placements(12, 8))
    assert 4 * 3600 < study.seconds(study.missing(runs)) / 2 < 12 * 3600  # a night on two cores


def test_shipped_results_are_the_runs_of_their_presets() -> None:
    """A method that is not of the paper adds no run to them, unless the preset names it as a rival."""
    for name in ("digits", "cifar10_128"):
        study = Study(presets.get(name), RESULTS / name)
        runs = study.with_awaited(everything(study))
        needed, shipped = {run.name for run in runs}, {path.stem for path in study.folder.glob("*.json")}
        assert needed == shipped if name == "digits" else needed > shipped  # not all of cifar10_128 is made
        methods = {run.downsampler for run in runs} - {"none", "convolution", "soft_selection"}
        assert methods == {*SELECTIONS, *CLUSTERINGS, *study.preset.rivals}


def test_a_preset_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from experiments.presets import digits\n"
        "PRESET = replace(digits.PRESET, name='mine', base_epochs=7)\n"
    )
    preset = presets.get(str(path))
    assert preset.name == "mine" and preset.base_epochs == 7 and preset.argument == str(path)
    assert presets.get("digits").argument == "digits"


def test_a_broken_preset_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    digits = "from dataclasses import replace\nfrom experiments.presets.digits import PRESET\nPRESET = replace(PRESET, "
    for text, complaint in (
        ("PRESET = (", "cannot read preset .*mine.py: SyntaxError"),
        ("PRESET = nothing", "cannot read preset .*mine.py: NameError: name 'nothing'"),
        (f"{digits}epochs=3)", "cannot read preset .*mine.py: TypeError: .*epochs'$"),
        (f"{digits}batch_size=3)", r"TypeError: .*batch_size'; write recipe=Recipe\(batch_size=...\)"),
        (f"{digits}name='a/b')", "cannot read preset .*mine.py: preset a/b: the name 'a/b' must consist of letters"),
        (
            f"{digits}name='a', clustered_level=9)",
            "cannot read preset .*mine.py: preset a: clustered_level = 9, but there are 4 penalties; .* 7 full_",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=complaint):
            presets.get(str(path))


@pytest.mark.parametrize("full", [True, False], ids=["full", "quick"])
@pytest.mark.parametrize("name", presets.NAMES)
def test_every_table_and_figure_of_every_preset_knows_its_runs(name: str, full: bool, tmp_path: Path) -> None:
    study = Study(presets.get(name), tmp_path, full)
    for item in artifacts.ARTIFACTS:
        missing = study.missing(needs(study, item))
        assert bool(missing) == (status(study, item)[0] == "missing")
        assert study.with_awaited(missing) and study.seconds(missing) > 0 if missing else True


def test_missing_runs_are_listed_in_the_quick_study_too(in_process, tmp_path: Path) -> None:
    done = in_process("figure", "1c", "--preset", "cifar10", "--quick", "--missing", "--results", str(tmp_path))
    assert done.returncode == 0 and "clusters-seed0: about" in done.stdout and not done.stderr


@pytest.mark.parametrize("name", presets.NAMES)
def test_a_copy_of_every_preset_under_a_name_of_its_own_is_taken(name: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(Path(presets.__file__).with_name(f"{name}.py").read_text().replace(f'name="{name}"', 'name="mine"'))
    preset = presets.get(str(path))
    assert dataclasses.replace(preset, name=name, file=None) == presets.get(name)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"clustered_level": 5}, "clustered_level = 5, but there are 4 penalties"),
        ({"clustered_level": -1}, "clustered_level = -1, but there are 4 penalties"),
        ({"penalties": (1e-2, 1e-3, 1e-4)}, "penalties = .* must be ascending"),
        ({"full_penalties": (1e-3, 1e-3, 1e-2)}, "full_penalties = .* must be ascending"),
        ({"full_penalties": (1e-3, 1e-3 + 1e-12, 1e-2)}, "full_penalties has equal entries: 0.001, 0.001, 0.01"),
        ({"penalties": (-1.0, 0.0, 1.0)}, "penalties = .* must be above 0"),
        ({"penalties": ()}, "clustered_level = 1, but there are 0 penalties"),
        ({"seeds": (0, 0)}, "seeds has equal entries"),
        ({"full_seeds": ()}, "full_seeds = .* one or more"),
        ({"extra_seeds": (0.5,)}, "extra_seeds = .* whole numbers"),
        ({"methods": ("wkmedoid",)}, "methods has 'wkmedoid'; methods with a schedule are .*wkmedoids"),
        ({"methods": ("convolution",)}, "methods has 'convolution'"),
        (
            {"rivals": ("tomee",)},
            "rivals has 'tomee'; expected methods that the study does not have already, of .*",
        ),
        ({"rivals": ("wkmedoids",)}, "rivals has 'wkmedoids'"),
        ({"rivals": ("hvt",)}, r"rival_placements = \(\), but the rivals without a schedule are hvt"),
        ({"rival_placements": ((1,),)}, "rival_placements = .* but the rivals without a schedule are none"),
        ({"added_seeds": ()}, "added_seeds = .* one or more"),
        ({"depth": 5}, "depth = 5 and grid = 8, but deit_digits_patch2_16 has 6 blocks and 8 tokens along a side"),
        ({"grid": 14}, "depth = 6 and grid = 14, but"),
        ({"model_options": {"depths": 6}}, "timm cannot create deit_digits_patch2_16 with .*depths"),
        ({"model": "resnet18"}, "timm cannot create resnet18|resnet18 is not a VisionTransformer"),
        ({"base_epochs": 0}, "base_epochs = 0: without training there is no search"),
        ({"search_epochs": 0}, "search_epochs = 0, but base_epochs = 50"),
        ({"finetune_epochs": 2.5}, "finetune_epochs = 2.5 must be a whole number"),
        ({"search_learning_rate": -1.0}, "search_learning_rate = -1.0 must not be negative"),
        (
            {"recipe": Recipe(learning_rate=1e-3, final_learning_rate=1e-3)},
            "final_learning_rate = 0.001 is above search_learning_rate = 0.0002",
        ),
        (
            {"recipe": Recipe(batch_size=31, mixup=0.8)},
            "batch_size = 31 must be a multiple of 2, for 1 processes, in pairs for mixup",
        ),
        ({"recipe": Recipe(retention_penalty=1.0)}, "recipe has retention_penalty = 1.0, which has no effect"),
        ({"redundancy_images": 9}, "redundancy_images = 9 must be 0"),
        ({"name": "../digits"}, "the name '../digits' must consist of letters"),
        ({"main": presets.Variant("a", "A")}, "the name of main is 'a', but must be empty"),
        (
            {"main": presets.Variant("", "A", schedules="deit_small")},
            "for 12 blocks, not for 6; .* or none of them",
        ),
        ({"family": {"deit_small": presets.Variant("s", "S")}}, "family has deit_small, but main stands for it"),
        ({"family": {"deit_huge": presets.Variant("h", "H")}}, "'deit_huge' is not a model of the paper"),
        ({"family": {"deit_tiny": presets.Variant("alpha", "T")}}, "family and normalised has equal entries: alpha"),
        (
            {"normalised": {"10a": presets.Variant("a", "A")}},
            "normalised has '10a': expected 10a and 10b, with qk_norm",
        ),
    ],
    ids=str,
)
def test_a_preset_that_contradicts_itself_is_refused(changes: dict, complaint: str) -> None:
    with pytest.raises(ValueError, match=f"^preset .*: .*(?:{complaint})"):
        dataclasses.replace(presets.get("digits"), **changes)


@pytest.mark.parametrize("text", ["", "PRESET = 3", "from experiments.presets.digits import PRESET"])
def test_a_file_that_is_no_preset_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine.py must define PRESET, a Preset with a name other than digits, "):
        presets.get(str(path))
    with pytest.raises(FileNotFoundError, match="no preset nowhere.py"):
        presets.get("nowhere.py")
