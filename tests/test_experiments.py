import dataclasses
import importlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from PIL import Image

from experiments import artifacts, needed, presets
from experiments.presets import Preset
from experiments.show import curves, tables
from tokenpool.analysis import bits, results
from tokenpool.downsampling import REGISTRY, Downsampler
from tokenpool.runs import execute, pool
from tokenpool.runs.run import Run, is_finished, result_path, weights_path
from tokenpool.runs.study import Study

ROOT = Path(__file__).parents[1]
TINY = {"embed_dim": 8, "depth": 3, "num_heads": 2, "patch_size": 4}


# The digits' protocol, as small as it gets.
PRESET = dataclasses.replace(
    presets.get("digits"),
    base_epochs=2,
    search_epochs=1,
    finetune_epochs=1,
    recipe=dataclasses.replace(presets.get("digits").recipe, batch_size=256, warmup_epochs=0),
    penalties=(1e-6, 1.0),
    methods=("random", "wkmedoids"),
    clustered_level=0,
    depth=3,
    grid=4,
    retention_learning_rate=0.2,
    model_options=TINY,
)


def reproduce(folder: Path, jobs: int, preset: Preset = PRESET) -> None:
    """The quick study."""
    study = Study(preset, folder, full=False)
    pool.make(study, artifacts.everything(study), jobs)


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished quick study."""
    folder = tmp_path_factory.mktemp("reproduced")
    reproduce(folder, jobs=2)
    return folder


def training_run(**changes) -> Run:
    setting = {"stage": "train", "label": "x", "data": "digits", "model": "deit_digits_patch2_16", "epochs": 3}
    setting |= {"downsampler": "random", "keep": (9, 4, 1), "batch_size": 256, "model_options": TINY}
    return Run.from_setting(setting | changes)


def stop_after_two() -> Callable[[], None]:
    """Stops a run in its second epoch, before that is saved."""
    calls: list[int] = []

    def count() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("pulled the plug")

    return count


def weights(run: Run, folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(weights_path(run.name, folder))


@pytest.mark.slow
def test_protocol_end_to_end(reproduced: Path, tmp_path: Path) -> None:
    shutil.copytree(reproduced, tmp_path, dirs_exist_ok=True)
    frame = results.load(tmp_path)
    assert sorted(frame["run"]) == sorted(
        ["base-seed0", "search-lambda1e-06-seed0", "search-lambda1-seed0", "finetune-none-seed0"]
        + [f"finetune-{method}-level{level}-seed0" for method in ("random", "wkmedoids") for level in (0, 1)]
    )
    searches = frame[frame["stage"] == "search"].sort_values("level")
    mild, strong = searches["learned_keep"]
    assert sum(strong) < sum(mild) <= 3 * 16
    tuned = frame[frame["stage"] == "finetune"]
    assert tuned[tuned["level"] == 1]["keep"].tolist() == [strong, strong]
    assert (frame["images"] == 450).all() and frame["top1"].between(0, 100).all()
    for row in frame.itertuples():  # searches, base models and fine-tuned ones: which images were right
        assert row.top1 == 100 * (bits.decode(row.correct, 450).sum() / 450)

    study = Study(PRESET, tmp_path, full=False)
    table = tables.cost_accuracy(study.points(needed.protocol_runs(study)))
    assert len(table) == 6 and (table["seeds"] == 1).all()
    text = tables.markdown(table)
    assert "none, base" in text and f"1: {', '.join(map(str, strong))}" in text
    for picture in curves.pareto_picture(table, tmp_path / "pareto"):
        assert picture.stat().st_size > 5000

    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    reproduce(tmp_path, jobs=2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")} == before

    # A result that is gone is made again, the same, although the base model's weights are gone too.
    lost = tmp_path / "finetune-wkmedoids-level0-seed0.json"
    top1 = results.read(lost)["metrics"]["top1"]
    lost.unlink()
    weights_path("base-seed0", tmp_path).unlink()
    reproduce(tmp_path, jobs=1)
    assert results.read(lost)["metrics"]["top1"] == top1


def test_differences_are_paired() -> None:
    rows = [
        {"stage": "finetune", "downsampler": method, "seed": seed, "level": level, "top1": 90 + 5 * seed - level + plus}
        for seed in (0, 1)
        for level in (0, 1)
        for method, plus in (("power_bert", 0), ("wkmedoids", 1 + seed), ("random", -2))
    ]
    found = tables.differences(pd.DataFrame(rows)).set_index("method")
    assert found["difference"].to_dict() == {"random": -2, "wkmedoids": 1.5}
    assert found["error"].to_dict() == {"random": 0, "wkmedoids": 0.5}
    assert "+1.50 ± 0.50" in tables.differences_markdown(found.reset_index())


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_weights(tmp_path: Path) -> None:
    run = training_run()
    execute.execute(run, tmp_path / "whole")

    with pytest.raises(RuntimeError, match="pulled the plug"):
        execute.execute(run, tmp_path / "cut", on_epoch=stop_after_two())
    assert not is_finished(run, tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints" / f"{run.name}.ckpt").exists()
    epochs: list[int] = []
    execute.execute(run, tmp_path / "cut", on_epoch=lambda: epochs.append(1))
    assert len(epochs) < 3  # it went on instead of starting anew
    whole, cut = weights(run, tmp_path / "whole"), weights(run, tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_killing_a_study_loses_nothing_finished(reproduced: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle; the workers end with their parent, the lock is free, and the study goes on."""
    script, folder = tmp_path / "study.py", tmp_path / "killed"
    script.write_text(
        "if __name__ == '__main__':\n"
        "    import pathlib\n"
        "    from tokenpool.runs import pool\n"
        "    from test_experiments import reproduce\n"
        f"    folder = pathlib.Path({str(folder)!r})\n"
        "    with pool.exclusive(folder):\n"
        "        reproduce(folder, jobs=1)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen([sys.executable, str(script)], env=environment) as killed:
        deadline = time.time() + 600  # on a busy machine
        while not (folder / "base-seed0.json").exists() and killed.poll() is None and time.time() < deadline:
            time.sleep(0.2)
        killed.send_signal(signal.SIGKILL)
        assert killed.wait() == -signal.SIGKILL
    time.sleep(1.5)  # for the worker to see it
    finished = {path: path.stat().st_mtime_ns for path in folder.glob("*.json")}
    assert 0 < len(finished) < len(list(reproduced.glob("*.json")))
    with pool.exclusive(folder):
        reproduce(folder, jobs=1)
    assert all(path.stat().st_mtime_ns == before for path, before in finished.items())
    for path in reproduced.glob("*.json"):
        one, other = results.read(path), results.read(folder / path.name)
        assert one["metrics"] == other["metrics"] and one["cost"] == other["cost"]


def test_one_study_a_folder(tmp_path: Path) -> None:
    with pool.exclusive(tmp_path), pytest.raises(RuntimeError, match="another study is writing to"):
        pool.exclusive(tmp_path).__enter__()


@pytest.mark.slow
def test_a_failing_run_is_named(tmp_path: Path) -> None:
    broken = dataclasses.replace(PRESET, recipe=dataclasses.replace(PRESET.recipe, learning_rate=1e30))
    with pytest.raises(RuntimeError, match="run base-seed0 failed: the loss is"):
        reproduce(tmp_path, jobs=1, preset=broken)


@pytest.fixture
def own_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Downsampler]]:
    """A user's own method in a module of its own, registered as "own"."""
    code = (
        "from tokenpool.downsampling import Method, PowerBert, register\n"
        "class Own(PowerBert):\n"
        "    pass\n"
        "register(Method('own', Own, kind='selection', label='Own', description='the same'))\n"
    )
    (tmp_path / "own_method.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("own_method").Own
    del REGISTRY["own"], sys.modules["own_method"]


@pytest.mark.slow
def test_processes_of_a_study_know_a_method_of_a_users_own(own_method: type[Downsampler], tmp_path: Path) -> None:
    run = training_run(downsampler="own", epochs=1)
    with pool.Runner(tmp_path, 1, lambda run: 1.0, 1.0) as runner:
        runner.run_all([run], lambda run, unfinished: run)
    assert is_finished(run, tmp_path)


def test_a_method_that_other_processes_cannot_import_is_named(own_method: type[Downsampler], tmp_path: Path) -> None:
    own_method.__module__ = "<run_path>"  # that of a class in the file of a preset
    with pytest.raises(ValueError, match="method 'own': other processes cannot import its class from <run_path>; move"):
        pool.Runner(tmp_path, 1, lambda run: 1.0, 1.0)


def test_other_settings_and_broken_files_are_named(tmp_path: Path) -> None:
    run = training_run(epochs=1)
    execute.execute(run, tmp_path)
    assert is_finished(run, tmp_path)
    with pytest.raises(ValueError, match=r"another setting \(epochs was 1, now 2\)"):
        is_finished(training_run(epochs=2), tmp_path)
    result_path(run, tmp_path).write_text("{")
    with pytest.raises(ValueError, match="train-x-seed0.json is not a JSON file of a run"):
        is_finished(run, tmp_path)
    broken = tmp_path / "checkpoints" / "train-y-seed0.ckpt"
    broken.write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match="cannot read checkpoint .*train-y-seed0.ckpt"):
        execute.execute(training_run(label="y"), tmp_path)


def test_a_checkpoint_of_another_setting_is_not_resumed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="pulled the plug"):
        execute.execute(training_run(), tmp_path, on_epoch=stop_after_two())
    with pytest.raises(ValueError, match=r"train-x-seed0.ckpt holds another setting \(split was 0, now 3\)"):
        execute.execute(training_run(split=3), tmp_path)


@pytest.mark.slow
def test_image_folders_resume_exactly(tmp_path: Path) -> None:
    """With workers, shuffling and augmentation."""
    random = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(8):
                pixels = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{index}.png")
    model_options = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 2}
    run = training_run(
        data=str(tmp_path / "images"), model="deit_tiny_patch16_224", model_options=model_options, batch_size=4
    )
    execute.execute(run, tmp_path / "whole")
    with pytest.raises(RuntimeError, match="pulled the plug"):
        execute.execute(run, tmp_path / "cut", on_epoch=stop_after_two())
    execute.execute(run, tmp_path / "cut")
    whole, cut = weights(run, tmp_path / "whole"), weights(run, tmp_path / "cut")
    assert all(torch.equal(whole[key], cut[key]) for key in whole)


@pytest.mark.slow
def test_stored_images_resume_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Light augmentation, killed in the second epoch; and prepared beforehand, so that no run decodes an image."""
    monkeypatch.setenv("TOKENPOOL_CACHE", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(9):
                pixels = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / part / name / f"{index}.png")
    model_options = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 3, "num_heads": 2, "num_classes": 2}
    options = {"data": str(tmp_path / "images"), "model": "deit_tiny_patch16_224", "batch_size": 4}
    options |= {"model_options": model_options, "augmentation": "light", "train_per_class": 8}
    run = training_run(**options)
    with pytest.raises(ValueError, match="val of .*images: expected 10 images of each class, but a has 9, b has 9"):
        execute.prepare_data([run, training_run(**options, test_per_class=10)])
    execute.prepare_data([training_run(**options, epochs=0, stage="evaluate"), run])
    monkeypatch.setattr("tokenpool.training.stored.load_image", lambda *source: pytest.fail(f"decodes {source}"))
    whole = execute.execute(run, tmp_path / "whole")
    assert whole["metrics"]["images"] == 18 and len(whole["epochs"]) == 3
    with pytest.raises(RuntimeError, match="pulled the plug"):
        execute.execute(run, tmp_path / "cut", on_epoch=stop_after_two())
    assert execute.execute(run, tmp_path / "cut")["metrics"] == whole["metrics"]
    first, second = weights(run, tmp_path / "whole"), weights(run, tmp_path / "cut")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_fine_tuning_with_learned_alpha_starts_from_a_plain_model(tmp_path: Path) -> None:
    plain = training_run(label="plain", downsampler="none", keep=None, epochs=1)
    execute.execute(plain, tmp_path)
    search = training_run(label="s", downsampler="soft_selection", keep=None, epochs=1, start=plain.name)
    execute.execute(search, tmp_path)
    tuned = training_run(qk_norm="l2", learn_alpha=True, alpha=2.0, start=search.name)
    assert execute.build_model(tuned, tmp_path).blocks[0].attn.alpha.item() == 2.0


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    execute.execute(training_run(epochs=1), tmp_path)
    path = weights_path("train-x-seed0", tmp_path)
    wider = training_run(start=str(path), model_options=TINY | {"embed_dim": 16})
    with pytest.raises(ValueError, match="train-x-seed0.safetensors holds the weights of another model"):
        execute.build_model(wider, tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights at .*nothing.safetensors"):
        execute.build_model(training_run(start="nothing"), tmp_path)
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="cannot read weights .*train-x-seed0.safetensors"):
        execute.build_model(training_run(start=str(path)), tmp_path)


def test_checkpoints_with_code_in_them_are_refused(tmp_path: Path) -> None:
    torch.save({"model": Path("somewhere")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot read weights .*evil.pth"):
        execute.build_model(training_run(start=str(tmp_path / "evil.pth")), tmp_path)
    torch.save(torch.ones(3), tmp_path / "bare.pth")
    with pytest.raises(ValueError, match="cannot read weights .*bare.pth"):
        execute.build_model(training_run(start=str(tmp_path / "bare.pth")), tmp_path)


def test_classes_are_compared_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the data have 10 classes, but the model has 7"):
        execute.execute(training_run(model_options=TINY | {"num_classes": 7}), tmp_path)


def test_help_lists_methods_models_and_presets(in_process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    shown = " ".join(in_process("train", "--help").stdout.split())
    for word in ("wkmedoids", "power_bert", "deit_e252_patch16_224", "Preset: digits", "Trainer"):
        assert word in shown


@pytest.mark.slow
def test_train_and_evaluate_from_the_command_line(tmp_path: Path, in_process) -> None:
    model = [f"--model-option={key}={value}" for key, value in TINY.items()]
    setting = ["--downsampler=wkmedoids", "--keep=9,4,0", "--option=iterations=3", *model]
    train = ["train", "--epochs=1", "--batch-size=256", f"--output={tmp_path}", "--name=a", *setting]
    first = in_process(*train)
    assert first.returncode == 0, first.stderr
    assert "of which clustering" in first.stdout
    run = results.read(tmp_path / "train-a-seed0.json")
    assert run["setting"]["keep"] == [9, 4, 0] and run["setting"]["options"] == {"iterations": 3}
    assert "finished already" in in_process(*train).stdout
    assert (
        "another setting (trainer_options was {}, now" in in_process(*train, "--trainer=limit_train_batches=2").stderr
    )
    test = ["evaluate", "--model=deit_digits_patch2_16", "--data=digits", f"--output={tmp_path}", *setting]
    second = in_process(*test, f"--weights={tmp_path}/weights/train-a-seed0.safetensors", "--name=b")
    assert second.returncode == 0, second.stderr
    tested = results.read(tmp_path / "evaluate-b-seed0.json")["metrics"]
    errors = tested.pop("relative_error")
    assert tested.pop("correct") == run["metrics"].pop("correct")
    assert tested == pytest.approx(run["metrics"], rel=1e-4)
    assert len(errors) == 3 and all(0 < error < 1 for error in errors[:2]) and errors[2] is None


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["reproduce", "--preset=digit"], "unknown preset 'digit'; known are digits"),
        (["train", "--downsampler=kmedoid", "--keep=1"], "unknown downsampler 'kmedoid'; known are none"),
        (["train", "--downsampler=kmedoids", "--keep=1,2"], "keep has 2 entries, but the model has 6 blocks"),
        (["train", "--downsampler=kmedoids", "--keep=1,x"], "keep = '1,x': invalid literal"),
        (["train", "--downsampler=kmedoids", "--keep=deit_small:9"], "level = 9.0 must be a number in 0..7"),
        (["train", "--model=deit"], "timm knows no model 'deit'"),
        (["train", "--data=nowhere"], "no folder nowhere/val"),
        (["train", "--trainer=devicse=2"], "Trainer does not take these options"),
        (["train", "--option=init"], "'init' must have the form name=value"),
        (["train", "--option=init=["], "'init=[' must have the form name=value with a YAML value"),
        (["train", "--trainer=accelerator=nothing"], "Trainer does not take these options"),
        (["train", "--learning-rate=1e30", "--epochs=1"], "the loss is nan at step"),
        (
            ["evaluate", "--model=deit_digits_patch2_16", "--data=digits", "--weights=none.pth"],
            "no weights at none.pth",
        ),
        (
            ["evaluate", "--model=deit_digits_patch2_16", "--data=digits"],
            "evaluate needs --weights FILE or --pretrained",
        ),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(
    tmp_path: Path, arguments: list[str], message: str, in_process
) -> None:
    done = in_process(*arguments, f"--output={tmp_path / 'out'}")
    assert done.returncode != 0
    assert f"error: {message}" in done.stderr or message in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
