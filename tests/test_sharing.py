"""Model cards, and models on the Hub: held against the runs, the counts and the files that they tell of."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalTokenNotFoundError
from PIL import Image
from test_experiments import TINY, training_run
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

import tokenpool
from experiments import presets
from experiments.commands.sharing import fine_tuned
from tokenpool import budget, card, checkpoint
from tokenpool.analysis import results
from tokenpool.downsampling import METHODS
from tokenpool.runs import execute
from tokenpool.runs.run import weights_path
from tokenpool.runs.study import Study
from tokenpool.training import fingerprint

KEEP = [20, 9, 4, 1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a run that started from another run, both beside each other."""
    folder = tmp_path_factory.mktemp("runs")
    base = training_run(label="base", downsampler="none", keep=None, epochs=1)
    tuned = training_run(stage="finetune", epochs=1, start=base.name)
    execute.execute(base, folder)
    execute.execute(tuned, folder)
    return folder / f"{tuned.name}.json"


def trained_model(result: Path) -> VisionTransformer:
    model = tokenpool.create_model("deit_digits_patch2_16", "random", [9, 4, 1], carry=False, **TINY).eval()
    tokenpool.load_weights(model, weights_path(result.stem, result.parent))
    return model


class LocalHub:
    """Uploads into a folder with the layout of huggingface_hub's own cache, from which its own functions read."""

    COMMIT = "0" * 40

    def __init__(self, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cache, self.created = cache, {}
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> str:
        self.created[repo_id] = private
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> None:
        place = self.cache / f"models--{repo_id.replace('/', '--')}"
        shutil.copytree(folder_path, place / "snapshots" / self.COMMIT)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(self.COMMIT)


def snippet(page: str) -> str:
    return re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1]


@torch.no_grad()
def test_a_folder_has_the_model_and_a_card_whose_snippet_runs(
    small: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = tokenpool.flops.count(small).gmacs
    tokenpool.patch(small, "wkmedoids", KEEP, iterations=3)
    tokenpool.save(small, tmp_path / "deit-0.7", metadata={"license": "mit"})
    page = ModelCard.load(tmp_path / "deit-0.7" / "README.md")
    assert page.data.license == "mit" and page.data.library_name == "tokenpool" and page.data.base_model is None
    unpatched = tokenpool.unpatch(tokenpool.load(tmp_path / "deit-0.7"))
    cost = budget.ScheduleCost(unpatched, METHODS["wkmedoids"], iterations=3)
    assert (
        f"| cost | {cost(KEEP) / 1e6:.3f} MMACs, of which" in page.text
        and f"| {1000 * plain:.3f} MMACs; this model:" in page.text
    )
    assert f"keep={KEEP}" in page.text and "`iterations=3`" in page.text and "| carry | `True`" in page.text
    assert "Not recorded" in page.text and "## Results\n\nNot measured." in page.text
    Image.new("RGB", (130, 100), "orange").save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    exec(snippet(page.text), names := {})
    assert names["image"].shape == (3, 96, 96) and torch.equal(names["output"], small(names["image"][None]))


def test_numbers_are_those_of_the_run(trained: Path, tmp_path: Path) -> None:
    run, before = results.read(trained), results.read(trained.parent / "train-base-seed0.json")
    tokenpool.save(trained_model(trained), tmp_path / "shared", run=trained, command="make it")
    page = ModelCard.load(tmp_path / "shared" / "README.md")
    (told,) = page.data.eval_results
    assert told.metric_value == round(run["metrics"]["top1"], 2) and told.dataset_name == "digits"
    assert (
        told.dataset_args == {"images": 450}
        and f"| images | 450 of digits ({run['identity']['test_images']})" in page.text
    )
    assert f"| top-1 | {run['metrics']['top1']:.2f} %" in page.text and f"`{trained.name}`, seed 0" in page.text
    first, second = re.findall(r"^\d\. Run .*$", page.text, flags=re.MULTILINE)
    assert "`train-base-seed0.json` (train), from random weights" in first and before["trained_weights"] in first
    assert f"from `train-base-seed0` ({before['trained_weights']})" in second and run["trained_weights"] in second
    assert "batch_size 256" in second and "```bash\nmake it\n```" in page.text
    assert str(trained.parent) not in page.content


def test_numbers_of_another_model_are_refused(trained: Path, tmp_path: Path) -> None:
    model = trained_model(trained)
    other = tokenpool.create_model("deit_digits_patch2_16", "random", [9, 4, 1], carry=False, **TINY)
    normalised = tokenpool.patch(trained_model(trained), "random", [9, 4, 1], qk_norm="l2")
    longer = tokenpool.patch(trained_model(trained), "random", [9, 4, 2], carry=False)
    half, broken = trained_model(trained).half(), tmp_path / "broken.json"
    broken.write_text('{"setting": {}}')
    evaluated = tmp_path / "evaluated.json"  # tells of no weights
    evaluated.write_text(json.dumps(results.read(trained) | {"trained_weights": None}))
    larger = tokenpool.create_model("deit_digits_patch2_16", "random", [9, 4, 1], carry=False, img_size=32, **TINY)
    for wrong, run, said in (
        (other, trained, "is a run of other weights"),
        (half, trained, "is a run of other weights"),
        (normalised, trained, "qk_norm was None, now 'l2'"),
        (longer, trained, r"keep was \[9, 4, 1\], now \(9, 4, 2\)"),
        (tokenpool.unpatch(trained_model(trained)), trained, "downsampler was 'random', now 'none'"),
        (larger, evaluated, "of another model or image size: "),
        (model, evaluated, "evaluated.json does not tell which weights it measured"),
        (model, broken, "broken.json is not the result of a run"),
    ):
        with pytest.raises(ValueError, match=said) as refused:
            tokenpool.save(wrong, tmp_path / "out", run=run)
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError, match="no run at .*absent.json"):
        tokenpool.save(model, tmp_path / "out", run=tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"m.safetensors is one file, without a model card"):
        tokenpool.save(model, tmp_path / "m.safetensors", run=trained)
    with pytest.raises(ValueError, match="broken.json is a file"):
        tokenpool.save(model, broken)


def test_a_run_without_training_is_of_the_weights_that_it_started_from(trained: Path, tmp_path: Path) -> None:
    options = {"downsampler": "power_bert", "keep": [9, 4, 1], "epochs": 0}
    run = training_run(stage="evaluate", start=trained.stem, **options)
    execute.execute(run, trained.parent)
    measured = trained.parent / f"{run.name}.json"
    same = tokenpool.patch(trained_model(trained), "power_bert", [9, 4, 1], carry=run.carry)
    tokenpool.save(same, tmp_path / "same", run=measured)
    assert (
        f"| top-1 | {results.read(measured)['metrics']['top1']:.2f} %" in (tmp_path / "same" / "README.md").read_text()
    )
    other = tokenpool.create_model("deit_digits_patch2_16", "power_bert", [9, 4, 1], carry=run.carry, **TINY)
    with pytest.raises(ValueError, match="is a run of other weights"):
        tokenpool.save(other, tmp_path / "other", run=measured)
    older = tmp_path / "older.json"
    older.write_text(json.dumps(results.read(measured) | {"identity": {}}))
    with pytest.raises(ValueError, match="older.json does not tell which weights it measured"):
        tokenpool.save(same, tmp_path / "other", run=older)


def pretrained_run(path: Path, model: torch.nn.Module, weights: str, **changes: Any) -> Path:
    """A run of pretrained weights, as `evaluate` writes it."""
    setting = {"stage": "evaluate", "data": "imagenet", "model": "test_vit", "downsampler": "none", "pretrained": True}
    found = {
        "setting": setting,
        "identity": {"pretrained_weights": weights},
        "metrics": {"top1": 51.0, "images": 500},
        "cost": {"gmacs": tokenpool.flops.count(model).gmacs},
    }
    for key, value in changes.items():
        found[key] = found.get(key, {}) | value if isinstance(value, dict) else value
    path.write_text(json.dumps(found))
    return path


def test_pretrained_weights_have_the_name_of_the_run(tmp_path: Path) -> None:
    model = timm.create_model("test_vit").eval()
    run = pretrained_run(tmp_path / "run.json", model, "timm test_vit.r160_in1k")
    tokenpool.save(model, tmp_path / "same", run=run)
    page = ModelCard.load(tmp_path / "same" / "README.md")
    assert page.data.base_model == "timm/test_vit.r160_in1k" and "content was not compared" in page.text
    other = pretrained_run(tmp_path / "other.json", model, "timm test_vit.another")
    with pytest.raises(ValueError, match="other.json is a run of other weights .timm test_vit.another, now "):
        tokenpool.save(model, tmp_path / "out", run=other)
    file = pretrained_run(tmp_path / "file.json", model, card.fingerprint(model.state_dict()))
    tokenpool.save(model, tmp_path / "file", run=file)
    page = ModelCard.load(tmp_path / "file" / "README.md")
    assert page.data.base_model is None and "and the weights of this model" in page.text


def test_a_run_that_met_a_budget_has_the_schedule_of_the_budget(tmp_path: Path) -> None:
    plain = timm.create_model("test_vit").eval()
    budget_of_run = 0.7 * tokenpool.flops.count(plain).gmacs
    keep = tokenpool.schedule_for(budget_of_run, plain, "power_bert", "stages")
    swapped = tokenpool.schedule_for(budget_of_run, plain, "power_bert", "decay")
    assert keep != swapped  # at equal cost
    model = tokenpool.patch(timm.create_model("test_vit").eval(), "power_bert", keep)
    setting = {"downsampler": "power_bert", "keep": None, "budget": budget_of_run, "family": "stages"}
    setting |= {"carry": True, "alpha": 1.0, "learn_alpha": False, "qk_norm": None, "options": {}}
    run = pretrained_run(tmp_path / "run.json", model, "timm test_vit.r160_in1k", setting=setting)
    tokenpool.save(model, tmp_path / "same", run=run)
    with pytest.raises(ValueError, match="run.json is a run of another model: keep was"):
        tokenpool.save(tokenpool.patch(model, "power_bert", swapped), tmp_path / "out", run=run)


def test_a_card_tells_of_a_part_of_the_classes_and_of_doubts(tmp_path: Path) -> None:
    model = timm.create_model("test_vit").eval()
    doubts = {"among_classes": [3, 250, 251], "warning": "top-1 is a guess: shuffled | wrong"}
    run = pretrained_run(tmp_path / "run.json", model, "timm test_vit.r160_in1k", **doubts)
    tokenpool.save(model, tmp_path / "part", run=run)
    page = ModelCard.load(tmp_path / "part" / "README.md")
    assert "| classes | among 3 of the model's 1000 classes |" in page.text
    assert r"| warning | top-1 is a guess: shuffled \| wrong |" in page.text
    (told,) = page.data.eval_results
    assert told.dataset_args == {"images": 500, "classes": "among 3 of the model's 1000 classes"}


@pytest.mark.parametrize(
    "part, key", [("setting", key) for key in ("stage", "data", "model")] + [("metrics", "images")]
)
def test_a_run_that_lacks_a_value_is_refused(part: str, key: str, tmp_path: Path) -> None:
    model = timm.create_model("test_vit").eval()
    run = pretrained_run(tmp_path / "run.json", model, "timm test_vit.r160_in1k")
    found = json.loads(run.read_text())
    del found[part][key]
    run.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=f"run.json lacks {part}.{key}: ") as refused:
        tokenpool.save(model, tmp_path / "out", run=run)
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_the_snippet_of_a_float16_model_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / 'a"b'
    tokenpool.save(timm.create_model("test_vit").eval().half(), folder, command="echo '```'")
    page = (folder / "README.md").read_text()
    assert "\n````bash\necho '```'\n````\n" in page
    Image.new("RGB", (130, 100), "orange").save(tmp_path / "photograph.jpg")
    monkeypatch.chdir(tmp_path)
    exec(snippet(page), names := {})
    assert names["output"].shape == (1, 1000) and names["output"].dtype == torch.float16


@pytest.mark.parametrize("name", ["user/..", "..", "user/", "a/b/c"])
def test_the_name_of_a_repository_is_checked_before_anything_is_written(
    name: str, small: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save_folder", lambda *_, **__: pytest.fail("written"))
    with pytest.raises(ValueError, match=r'cannot push to .*: expected "user/name"') as refused:
        tokenpool.push_to_hub(small, name)
    assert "\n" not in str(refused.value)


@torch.no_grad()
def test_to_the_hub_and_back(
    trained: Path, small: VisionTransformer, photos: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = LocalHub(tmp_path, monkeypatch)
    url = tokenpool.push_to_hub(trained_model(trained), "me/digits", run=trained, private=True)
    assert url.endswith("me/digits") and hub.created == {"me/digits": True}
    folder = tmp_path / "models--me--digits" / "snapshots" / hub.COMMIT
    assert "tokenpool.from_hub('me/digits')" in (folder / "README.md").read_text()
    tokenpool.push_to_hub(tokenpool.patch(small, "kmeans", KEEP), "me/small")
    for revision in (None, "main", hub.COMMIT):
        model = tokenpool.from_hub("me/small", revision=revision, cache_dir=tmp_path)
        assert torch.equal(model(photos), small(photos)) and not model.training
    assert torch.equal(
        tokenpool.from_hub(tmp_path / "models--me--small" / "snapshots" / hub.COMMIT)(photos), small(photos)
    )


def test_errors_of_the_hub_are_one_line(
    small: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = LocalHub(tmp_path, monkeypatch)
    for repo, revision, kind, said in (
        ("me/absent", None, ConnectionError, "me/absent is not in the cache, and the Hub cannot be reached"),
        ("me/absent", "v1", ConnectionError, "me/absent at revision v1 is not in the cache"),
        ("a/b/c", None, ValueError, "a/b/c is no local folder and no repository"),
        (tmp_path, "v1", ValueError, "is a folder, which has no revisions"),
        (tmp_path, None, FileNotFoundError, "no model at .*model.safetensors"),
    ):
        with pytest.raises(kind, match=said) as refused:
            tokenpool.from_hub(repo, revision=revision, cache_dir=tmp_path)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="a DataParallel wraps the model"):
        tokenpool.push_to_hub(torch.nn.DataParallel(small), "me/small")
    assert not hub.created

    def fail(error: Exception) -> None:
        raise error

    for error, said in (
        (LocalTokenNotFoundError("a\nb"), "no access token; run `hf auth login`"),
        (ConnectionError("no network\nat all"), "no network; save the model by tokenpool.save"),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, error=error, **__: fail(error))
        with pytest.raises(OSError, match=f"cannot push to me/small: {said}") as refused:
            tokenpool.push_to_hub(small, "me/small")
        assert "\n" not in str(refused.value)


PRESET = """
from dataclasses import replace
from experiments import presets
from experiments.presets.digits import PRESET
recipe = replace(PRESET.recipe, batch_size=256, warmup_epochs=0)
PRESET = replace(
    PRESET, name="tiny", base_epochs=1, search_epochs=1, finetune_epochs=1, recipe=recipe, penalties=(1e-6,),
    methods=("wkmedoids",), clustered_level=0, depth=3, grid=4, model_options={"patch_size": 4, **SIZE},
)
"""


@pytest.mark.slow
def test_one_command_writes_the_models_of_a_preset(tmp_path: Path, in_process) -> None:
    preset, folder, out = tmp_path / "tiny.py", tmp_path / "runs", tmp_path / "out"
    preset.write_text(PRESET.replace("SIZE", str({key: TINY[key] for key in ("embed_dim", "depth", "num_heads")})))
    made = in_process("reproduce", "--preset", str(preset), "--output", str(folder), "--jobs", "1")
    assert made.returncode == 0, made.stderr
    share = ["share", "--quick", "--preset", str(preset), "--results", str(folder), "--output", str(out)]
    done = in_process(*share, "--metadata", "license=mit")
    assert done.returncode == 0, done.stderr
    names = ["finetune-none-seed0", "finetune-wkmedoids-level0-seed0"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert all(f"hf upload USER/NAME {out / name}" in done.stdout for name in names)
    run = results.read(folder / f"{names[1]}.json")
    model = tokenpool.load(out / names[1])
    tested = execute.training_module(training_run(epochs=0), model)
    data = execute.data_module(training_run(epochs=0))
    data.setup("test")
    right = sum((tested.model(images).argmax(1) == labels).sum().item() for images, labels in data.test_dataloader())
    assert 100 * right / 450 == pytest.approx(run["metrics"]["top1"])
    page = ModelCard.load(out / names[1] / "README.md")
    assert page.data.license == "mit" and f"keep={run['setting']['keep']}" in page.text
    assert f"run {names[1]} --quick --preset" in page.text and str(folder) not in page.content

    weights = weights_path(names[1], folder)
    shutil.copy(weights_path(names[0], folder), weights)  # of the same names and shapes
    other = in_process(*share, "--run", "finetune-wk*")
    assert other.returncode == 1 and "is a run of other weights" in other.stderr
    weights.unlink()
    lacking = in_process(*share)
    assert lacking.returncode == 1 and "no weights of 1 of 2 models, for example finetune-wkmedoids" in lacking.stderr
    assert f"make them by `python -m experiments reproduce --preset {preset}`" in lacking.stderr
    assert in_process(*share, "--run", "finetune-none-*").returncode == 0
    assert "no fine-tuned model nothing-*" in in_process(*share, "--run", "nothing-*").stderr


def test_the_shipped_results_have_no_weights_and_say_how_to_make_them() -> None:
    study = Study(presets.get("cifar10_128"), Path(__file__).parents[1] / "results" / "cifar10_128")
    with pytest.raises(FileNotFoundError, match=r"reproduce --full --preset cifar10_128 --data FOLDER`") as refused:
        fine_tuned(study, ["finetune-wkmedoids-level*"])
    assert "\n" not in str(refused.value)


def test_the_fingerprint_is_that_of_the_file(trained: Path) -> None:
    state = trained_model(trained).state_dict()
    assert card.fingerprint(state) == fingerprint.of_weights(weights_path(trained.stem, trained.parent))
