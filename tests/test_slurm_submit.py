"""Job arrays and their dependencies, with programs in place of Slurm's that write down what they are asked."""

import dataclasses
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm

import tokenpool
from experiments import presets
from experiments.artifacts import everything, needs
from experiments.commands import COMMANDS
from experiments.slurm import queue, status, submit
from tokenpool.analysis import results
from tokenpool.commands.shell import application
from tokenpool.runs import checks, data_sets, execute, pool
from tokenpool.runs.run import WEIGHTS, Run, result_path, weights_path
from tokenpool.runs.study import Study

app = application(COMMANDS, "")

ROOT = Path(__file__).parents[1]
FAKES = {
    # Refuses the scripts that the file "refused" matches, and everything in partition "nowhere".
    "sbatch": """
case "$*" in *--test-only*) ;; *) echo "$*" >>"$SLURM/submitted" ;; esac
for SCRIPT; do :; done
if grep -q "^#SBATCH --partition=nowhere" "$SCRIPT"; then echo "invalid partition: nowhere" >&2; exit 1; fi
case "$*" in *--test-only*) exit 0 ;; esac
if [ -f "$SLURM/refused" ] && grep -q -f "$SLURM/refused" <<<"$SCRIPT"; then echo "too many jobs" >&2; exit 1; fi
COUNT=$(wc -l <"$SLURM/submitted")
echo "$((100 + COUNT));cluster"
""",
    "squeue": """
[ -f "$SLURM/down" ] && { echo "no controller" >&2; exit 1; }
cat "$SLURM/queue" 2>/dev/null; exit 0
""",
    "scontrol": """echo "MaxArraySize = $(cat "$SLURM/longest" 2>/dev/null || echo 1001)" """,
}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the programs find what to say, and where `submitted` holds the calls of sbatch."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    (folder / "submitted").touch()
    for name, text in FAKES.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("SLURM", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    for variable in (data_sets.DATA, WEIGHTS):
        monkeypatch.delenv(variable, raising=False)
    return folder


@pytest.fixture
def quick(tmp_path: Path) -> Study:
    """The quick study of the digits, of which nothing is done, in a folder whose name is a nuisance."""
    return Study(presets.get("digits"), tmp_path / "the digits' 100%", full=False)


def put_in_order(study: Study, **options) -> str:
    return "\n".join(submit.submit(Study(study.preset, study.folder, study.full), everything(study), **options))


def calls(slurm: Path) -> list[str]:
    return (slurm / "submitted").read_text().splitlines()


def finish(study: Study, name: str) -> None:
    """As if the run were finished: its result as committed, of which only the setting is this study's."""
    run = next(run for run in study.with_awaited(everything(study)) if run.name == name)
    found = results.read(ROOT / "results" / "digits" / f"{name}.json")
    found["setting"] |= {"level": run.level, "epochs": run.recipe.epochs}
    results.save(found, result_path(run, study.folder))
    if run.stage == "base":
        weights = weights_path(name, study.folder)
        weights.parent.mkdir(exist_ok=True)
        weights.touch()


def in_queue(slurm: Path, *lines: str) -> None:
    (slurm / "queue").write_text("".join(f"{line}\n" for line in lines))


def tasks_of(script: Path) -> list[str]:
    """The names of the runs in a script, as bash reads them."""
    text = script.read_text()
    array = text[text.index("RUNS=(") : text.index("\n)\n") + 3]
    shown = subprocess.run(["bash", "-c", f'{array}printf "%s\\n" "${{RUNS[@]}}"'], capture_output=True, text=True)
    return shown.stdout.splitlines()


def edited(folder: Path, change: Callable[[str], str]) -> Path:
    template = folder / "my template.sh"
    template.write_text(change(submit.TEMPLATE.read_text()))
    return template


@pytest.mark.parametrize("full", [False, True])
def test_the_graph_is_complete(full: bool, slurm: Path, tmp_path: Path) -> None:
    """Each run is submitted once, each after what it needs, and waits for exactly that."""
    study = Study(presets.get("digits"), tmp_path / "digits", full)
    put_in_order(study)
    known = {run.name: run for run in study.with_awaited(everything(study))}
    jobs = json.loads((study.folder / "slurm" / "jobs.json").read_text())
    assert jobs.keys() == known.keys() and len(set(jobs.values())) == len(jobs)
    names = {job: name for name, job in jobs.items()}
    for number, call in enumerate(calls(slurm), start=101):
        options = shlex.split(call)
        script = Path(call[call.index(str(study.folder)) :])
        after = [option.partition("afterok:")[2].split(":") for option in options if "--dependency" in option]
        waits = {names[job] for job in (after[0] if after else [])}
        assert all(int(job.partition("_")[0]) < number for job in (after[0] if after else []))
        tasks = tasks_of(script)
        assert [jobs[name] for name in tasks] == [f"{number}_{index}" for index in range(len(tasks))]
        for name in tasks:
            run = known[name]
            base = {} if run.start is None else {run.start}
            if run.keep is None and run.level is not None and run.stage != "search":
                variant = run.variant if run.variant in ("e252", "e318") else ""
                penalty = f"lambda{study.penalties[run.level]:g}"
                base = {*base, "-".join(filter(None, ["search", variant, penalty, "seed0"]))}
            assert waits == set(base), name
        assert len({(known[name].stage, known[name].variant) for name in tasks}) == 1


def test_scripts_are_bash_with_every_path_quoted(slurm: Path, quick: Study, tmp_path: Path) -> None:
    put_in_order(quick)
    scripts = sorted((quick.folder / "slurm" / "scripts").glob("*.sh"))
    assert len(scripts) == len(calls(slurm)) == 7
    for script in scripts:
        assert subprocess.run(["bash", "-n", script], capture_output=True).stderr == b""
        text = script.read_text()
        assert "{{" not in text and "{%" not in text
        assert f"#SBATCH --array=0-{len(tasks_of(script)) - 1}%16\n" in text
        # Slurm takes quotes as bash does; a percent sign of its own has two.
        output = shlex.split(re.search("^#SBATCH (--output=.*)$", text, re.MULTILINE)[1])
        assert output == [f"--output={tmp_path}/the digits' 100%%/slurm/logs/%x-%A_%a.out"]


@pytest.mark.parametrize("code", [0, 1, 137])
@pytest.mark.parametrize("saves", [False, True])
def test_what_a_script_does(code: int, saves: bool, slurm: Path, quick: Study, tmp_path: Path) -> None:
    """It hands its task to srun, ends as srun does, and is requeued if it was killed after a checkpoint."""
    put_in_order(quick, patterns=["finetune-none*"])
    names = tasks_of(quick.folder / "slurm" / "scripts" / "digits-finetune-1.sh")
    checkpoint = quick.folder / "checkpoints" / f"{names[0]}.ckpt"
    checkpoint.parent.mkdir(exist_ok=True)
    checkpoint.touch()
    os.utime(checkpoint, (1, 1))  # of an earlier attempt
    srun = ['printf "%s\\n" "$@" >"$SLURM/arguments"', f"touch {shlex.quote(str(checkpoint))}" if saves else "", "exit"]
    (slurm / "srun").write_text("#!/bin/bash\n" + "\n".join(srun) + f" {code}\n")
    (slurm / "scontrol").write_text('#!/bin/bash\necho "$@" >"$SLURM/requeued"\n')
    (slurm / "srun").chmod(0o755)
    given = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "0", "SLURM_JOB_NODELIST": "n1"}
    script = quick.folder / "slurm" / "scripts" / "digits-finetune-1.sh"
    done = subprocess.run(["bash", script], env=os.environ | given, capture_output=True, text=True)
    assert done.stderr == "" and done.stdout == ""
    expected = [sys.executable, "-m", "experiments", "run", "--preset", "digits", "--results", str(quick.folder)]
    assert (slurm / "arguments").read_text().splitlines()[1:] == [*expected, "--quick", names[0]]
    log = (quick.folder / "slurm" / "logs" / f"{names[0]}.log").read_text()
    assert "job 7_0 starts, restart 0, on n1" in log
    again = code > 128 and saves
    assert (slurm / "requeued").exists() == again and done.returncode == (0 if again else code)
    assert ("requeued" if again else f"ends with exit code {code}") in log.splitlines()[-1]


def test_nothing_is_submitted_twice(slurm: Path, quick: Study) -> None:
    put_in_order(quick)
    jobs = queue.submitted(quick.folder)
    in_queue(slurm, *(f"{job}|PENDING|Dependency|" for job in jobs.values()))
    count = len(calls(slurm))
    assert f"0 runs to submit, {len(jobs)} in the queue already" in put_in_order(quick)
    assert len(calls(slurm)) == count


def test_failures_are_submitted_again_and_depend_on_what_is_in_the_queue(slurm: Path, quick: Study) -> None:
    put_in_order(quick)
    before = queue.submitted(quick.folder)
    finish(quick, "base-seed0")
    over = {"search-lambda0.001-seed0": "RUNNING", "search-lambda0.01-seed0": "REQUEUED"}
    over |= {"search-lambda0.0001-seed0": "FAILED", "search-lambda0.1-seed0": "COMPLETED"}
    in_queue(slurm, *(f"{before[name]}|{state}|None|n1" for name, state in over.items()))
    count = len(calls(slurm))
    put_in_order(quick, patterns=["search-*", "finetune-random-*"])
    after = queue.submitted(quick.folder)
    changed = {name for name in after if after[name] != before[name]}
    searches = {"search-lambda0.0001-seed0", "search-lambda0.1-seed0"}
    assert changed == searches | {f"finetune-random-level{level}-seed0" for level in range(4)}
    new = calls(slurm)[count:]
    assert "--dependency" not in new[0]  # the searches, as the base model is finished
    expected = [after["search-lambda0.0001-seed0"], before["search-lambda0.001-seed0"]]
    expected += [before["search-lambda0.01-seed0"], after["search-lambda0.1-seed0"]]
    assert [call.split("afterok:")[1].split()[0] for call in new[1:]] == expected


def test_an_array_that_slurm_refuses_loses_nothing(slurm: Path, quick: Study) -> None:
    (slurm / "refused").write_text("digits-finetune-2")
    with pytest.raises(RuntimeError, match="sbatch failed .*too many jobs"):
        put_in_order(quick)
    first = queue.submitted(quick.folder)
    assert {name.partition("-")[0] for name in first} == {"base", "search", "finetune"} and len(first) == 6
    in_queue(slurm, *(f"{job}|PENDING|Dependency|" for job in first.values()))
    (slurm / "refused").unlink()
    assert "6 in the queue already" in put_in_order(quick)
    assert queue.submitted(quick.folder).items() > first.items()
    assert len(queue.submitted(quick.folder)) == 18


def test_only_some_and_what_they_need(slurm: Path, quick: Study) -> None:
    put_in_order(quick, patterns=["finetune-*-level1-*"])
    expected = {"base-seed0", "search-lambda0.001-seed0"}
    expected |= {f"finetune-{method}-level1-seed0" for method in quick.preset.methods}
    assert queue.submitted(quick.folder).keys() == expected
    with pytest.raises(ValueError, match="--only finetune-x matches no missing run"):
        put_in_order(quick, patterns=["finetune-x"])


def test_long_arrays_are_split(slurm: Path, tmp_path: Path) -> None:
    (slurm / "longest").write_text("10")
    study = Study(presets.get("digits"), tmp_path / "digits")
    list(submit.submit(study, needs(study, "figure 8")))
    sizes = [len(tasks_of(Path(call.split()[-1]))) for call in calls(slurm)]
    assert max(sizes) == 10 and sum(sizes) == len(queue.submitted(study.folder))


def test_dry_run_queues_nothing(slurm: Path, quick: Study) -> None:
    shown = put_in_order(quick, dry_run=True)
    assert calls(slurm) == [] and queue.submitted(quick.folder) == {}
    assert re.search(r"digits-search-1 +4 +0\.0 +base-seed0\n", shown) and re.search(r"7 in all +18 +0\.\d", shown)
    assert len(list((quick.folder / "slurm" / "scripts").glob("*.sh"))) == 7


def test_without_slurm(quick: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="squeue not found"):
        put_in_order(quick)
    assert "the scripts are not tested" in put_in_order(quick, dry_run=True)
    queue.remember(["base-seed0"], "5", quick.folder)
    shown = "\n".join(status.show(quick, everything(quick)))
    assert "squeue not found" in shown and re.search(r"base +0 +0 +0 +0 +1 +0\n", shown)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("{{ command }}", "python"), r"lacks \{\{ command \}\}"),
        (lambda text: text + "{{ partition }}", r"unknown \{\{ partition \}\}; known are array, command, "),
        (lambda text: text + "{% if %}", "my template.sh: Expected an expression"),
        (lambda text: text + "{{ runs.nothing }}", "my template.sh: 'list object' has no attribute 'nothing'"),
        (lambda text: text.replace("##SBATCH --partition=gpu", "#SBATCH --partition=nowhere"), "nowhere"),
        (
            lambda text: text.replace("node={{ processes }}", "node=3"),
            "1 x 3 tasks, but the batch of 32 images",
        ),
        (lambda text: text.replace("#SBATCH --nodes=1", "#SBATCH -N 3"), "3 x 1 tasks, but the batch of 32"),
    ],
)
def test_templates_are_checked_before_anything_is_queued(
    change: Callable[[str], str], message: str, slurm: Path, quick: Study, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, RuntimeError), match=f"my template.sh.*{message}|{message}"):
        put_in_order(quick, template=edited(tmp_path, change))
    assert calls(slurm) == []


def test_a_template_may_count_its_runs(slurm: Path, quick: Study, tmp_path: Path) -> None:
    """Bash's own `${#RUNS[@]}` is no comment of Jinja's."""
    put_in_order(quick, template=edited(tmp_path, lambda text: text + 'echo "${#RUNS[@]}"\n'))
    assert '"${#RUNS[@]}"' in (quick.folder / "slurm" / "scripts" / "digits-base-1.sh").read_text()


def test_an_absent_template_and_other_settings_are_named(slurm: Path, quick: Study, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no template .*nothing.sh"):
        put_in_order(quick, template=tmp_path / "nothing.sh")
    finish(quick, "base-seed0")
    changed = Study(dataclasses.replace(quick.preset, base_epochs=1), quick.folder, full=False)
    setting = "base-seed0.json holds another setting"
    with pytest.raises(ValueError, match=setting), pytest.warns(UserWarning, match=setting):
        put_in_order(changed)
    assert calls(slurm) == []


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """ImageNet's layout with three classes and no images."""
    for part in ("train", "val"):
        for name in "abc":
            (tmp_path / "my images" / part / name).mkdir(parents=True)
    return tmp_path / "my images"


def some(images: Path, **changes) -> list[Run]:
    setting = {"stage": "evaluate", "label": "x", "data": "imagenet", "model": "deit_tiny_patch16_224"}
    return [Run.from_setting(setting | {"model_options": {"num_classes": 3}} | changes)]


def test_images_are_checked(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(data_sets.DATA, raising=False)
    with pytest.raises(ValueError, match="no images: --data or the variable"):
        checks.check_data(some(images))
    monkeypatch.setenv(data_sets.DATA, str(images))
    checks.check_data(some(images))
    (images / "val" / ".ipynb_checkpoints").mkdir()
    checks.check_data(some(images))
    with pytest.raises(
        ValueError, match=r"val of .*my images has 3 classes, but the model of evaluate-x-seed0 has 1000"
    ):
        checks.check_data(some(images, model_options={}))
    shutil.rmtree(images / "train")
    checks.check_data(some(images))
    with pytest.raises(FileNotFoundError, match="no folder .*my images/train"):
        checks.check_data(some(images, epochs=1))


def test_weights_are_checked(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_classes": 3, "embed_dim": 24, "depth": 2, "num_heads": 2}
    runs = some(images, pretrained=True, model_options=small, downsampler="wkmedoids", keep=(9, 4))
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "none.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"no weights at .*none\.safetensors"):
        checks.check_weights(runs)
    tokenpool.save(timm.create_model("deit_tiny_patch16_224", **small), tmp_path / "small.safetensors")
    monkeypatch.setenv(WEIGHTS, str(tmp_path / "small.safetensors"))
    checks.check_weights(runs)
    with pytest.raises(ValueError, match="weights of another model"):
        checks.check_weights(some(images, pretrained=True, model_options=small | {"depth": 3}))


def test_data_and_weights_reach_the_run(slurm: Path, images: Path, tmp_path: Path, monkeypatch) -> None:
    preset = dataclasses.replace(presets.get("pretrained"), model_options={"num_classes": 3})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(data_sets.DATA, images.name)
    study = Study(preset, tmp_path / "pretrained")
    list(submit.submit(study, study.evaluations(("none", "kmedoids"), carry=True)))
    text = (study.folder / "slurm" / "scripts" / "pretrained-evaluate-1.sh").read_text()
    assert f"export TOKENPOOL_DATA='{images}'\n" in text and "TOKENPOOL_WEIGHTS" not in text
    assert "#SBATCH --ntasks-per-node=1\n" in text and "--exclusive" not in text
    assert len(calls(slurm)) == 1 and len(queue.submitted(study.folder)) == 9


def test_status_of_every_kind(slurm: Path, quick: Study) -> None:
    put_in_order(quick, patterns=["finetune-*-level0-*", "search-lambda0.001-*"])
    jobs = queue.submitted(quick.folder)
    finish(quick, "base-seed0")
    finish(quick, "search-lambda0.001-seed0")
    in_queue(
        slurm,
        f"{jobs['search-lambda0.0001-seed0']}|RUNNING|None|n1",
        f"{jobs['finetune-wkmedoids-level0-seed0']}|PENDING|Dependency|",
        f"{jobs['finetune-random-level0-seed0']}|FAILED|NonZeroExitCode|n1",
    )
    logs = quick.folder / "slurm" / "logs"
    (logs / "search-lambda0.0001-seed0.log").write_text("before\n  10%\r  20%\r\n")
    (logs / "finetune-random-level0-seed0.log").write_text("".join(f"line {index}\n" for index in range(9)))
    (logs / f"digits-x-{jobs['finetune-random-level0-seed0']}.out").write_text("no memory\n")
    shown = "\n".join(status.show(quick, everything(quick)))
    rows = {line.split()[0]: [int(number) for number in line.split()[1:]] for line in shown.splitlines()[4:8]}
    assert rows == {"base": [1, 0, 0, 0, 0], "search": [1, 1, 0, 0, 2], "finetune": [0, 0, 1, 2, 10]} | {
        "all": [2, 1, 1, 2, 12]
    }
    assert f"job {jobs['search-lambda0.0001-seed0']} on n1\n    20%\n" in shown
    assert "queued 1 run: waits for search-lambda0.0001-seed0" in shown
    said = "\n".join(f"    line {index}" for index in range(4, 9))
    assert f"job {jobs['finetune-random-level0-seed0']}\n{said}\n    no memory" in shown and "line 3" not in shown
    assert f"job {jobs['finetune-power_bert-level0-seed0']}\n    it never started" in shown
    long = "\n".join(status.show(quick, everything(quick), long=True))
    for run in quick.with_awaited(everything(quick)):
        assert run.name in long
    assert "missing finetune-none-seed0\n" in long and "done base-seed0\n" in long


@pytest.mark.filterwarnings("ignore:The `srun` command is available")
def test_the_command_line(
    slurm: Path, quick: Study, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def command(*arguments: str, refused: str = "") -> str:
        line = [*arguments, "--results", str(quick.folder)]
        with pytest.raises((ValueError, RuntimeError), match=refused) if refused else nullcontext():
            app(line, standalone_mode=False)
        return capsys.readouterr().out

    command("submit", "--quick", refused="submit needs one of --figure NAME, --table NAME and --all")
    shown = command("submit", "--all", "--quick", "--only", "search-lambda0.1-*", "--dry-run")
    assert "2 in all" in shown and calls(slurm) == []
    command("submit", "--preset", "pretrained", "--figure", "3a", refused="figure 3a is not part of preset pretrained")
    command("status", "--all", "--table", "3", refused="status takes one of")
    assert re.search("all +0 +0 +0 +0 +18\n", command("status", "--quick"))
    command("run", "search-x", refused="has no run 'search-x'")
    command("run", "finetune-none-seed0", refused="finetune-none-seed0 starts from base-seed0, which is not finished")
    finish(quick, "base-seed0")
    model = tokenpool.create_model(quick.preset.model, **quick.preset.model_options)
    execute.save_weights(model, weights_path("base-seed0", quick.folder))
    evaluation = "evaluate-power_bert-level6-seed0"
    command("run", evaluation, refused=f"{evaluation} needs the schedule that search-lambda0.1-seed0 learns")
    finish(Study(quick.preset, quick.folder), "search-lambda0.1-seed0")
    with pool.exclusive_run(evaluation, quick.folder):
        command("run", evaluation, refused=f"another process is making run {evaluation}")
    assert f"{evaluation}: top-1 " in command("run", evaluation)
    outcome = results.read(quick.folder / f"{evaluation}.json")
    learned = results.read(quick.folder / "search-lambda0.1-seed0.json")["metrics"]["learned_keep"]
    assert outcome["setting"]["keep"] == learned
    assert f"{evaluation} is finished already" in command("run", evaluation)


def test_a_file_system_without_locks_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments) -> None:
        raise OSError(pool.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(pool.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="No locks available"), pool.exclusive_run("x", tmp_path):
        pass


def test_what_is_awaited_agrees_with_what_is_missing(quick: Study) -> None:
    for name in ("", "search-lambda0.01-seed0", "base-seed0"):
        if name:
            finish(quick, name)
        study = Study(quick.preset, quick.folder, full=False)
        lacking = [run.name for run in study.missing(everything(study))]
        names = [run.name for run in study.with_awaited(everything(study))]
        assert set(lacking) <= set(names) and len(names) == len(set(names)) == 18
        assert ("base-seed0" in lacking) == (name != "base-seed0")
        for run in study.with_awaited(everything(study)):
            before = names[: names.index(run.name)]
            assert all(other.name in before for other in study.awaited(run))
