"""Training on a real Slurm of two nodes, through `submit`: `make test-slurm`."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tokenpool.analysis import results

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slurm

# A quick study of six runs. Base model and searches train on two nodes, one process each.
PRESET = """
from dataclasses import replace
from experiments import presets
from tokenpool.training.recipe import Recipe
PRESET = replace(
    presets.get("digits"), name="tiny", base_epochs={epochs}, search_epochs=1, finetune_epochs=1,
    recipe=Recipe(batch_size=128, learning_rate={rate}, warmup_epochs=3, mixup=0.8, cutmix=1.0, repeats=3,
                  ema_decay=0.9),
    penalties=(1e-3, 1e-2),
    methods=("wkmedoids",), depth=3, grid=4,
    model_options={{"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "weight_init": "jax",
                   "drop_path_rate": 0.1}},
)
"""


class Study:
    """The study of a preset on the cluster, with its results in a folder of its own."""

    def __init__(self, cluster: Path, folder: Path, **options: object) -> None:
        self.folder = folder / "results"
        self.preset = folder / "tiny.py"
        self.preset.write_text(PRESET.format(**{"epochs": 30, "rate": "1e-3"} | options))
        self.template = folder / "template.sh"
        text = (cluster / "template.sh").read_text()
        self.template.write_text(text.replace("--nodes=1", "--nodes={{ 1 if 'finetune' in job else 2 }}"))

    def call(self, verb: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "ignore", "-m", "experiments", verb, "--preset", self.preset, "--quick"]
        command += ["--results", self.folder, *arguments]
        return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)

    def submit(self, *arguments: str) -> str:
        done = self.call("submit", "--template", str(self.template), *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> str:
        done = self.call("status", "--long")
        assert done.returncode == 0, done.stderr
        return done.stdout

    def log(self, run: str) -> str:
        path = self.folder / "slurm" / "logs" / f"{run}.log"
        return path.read_text() if path.exists() else ""

    def result(self, run: str) -> Path:
        return self.folder / f"{run}.json"

    def weights(self, run: str) -> list[dict[str, torch.Tensor]]:
        return [load_file(self.folder / "weights" / f"{run}{kind}.safetensors") for kind in ("", ".ema")]


def wait_for(condition: Callable[[], object], study: Study, run: str, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        queue = subprocess.run(["squeue", "-a"], capture_output=True, text=True, check=False).stdout
        assert time.monotonic() < end, f"{queue}\n{study.log(run)}"
        time.sleep(0.2)


def jobs() -> set[str]:
    """Those in Slurm's queue."""
    return set(subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True).stdout.split())


def second_process(study: Study, run: str) -> int:
    """Number of the process that is the second one of a training."""
    found = subprocess.run(["pgrep", "-f", f"{study.folder}.* {run}$"], capture_output=True, text=True, check=True)
    numbers = [
        number
        for number in map(int, found.stdout.split())
        if "SLURM_PROCID=1\0" in Path(f"/proc/{number}/environ").read_text()
    ]
    assert len(numbers) == 1
    return numbers[0]


@pytest.fixture(scope="module")
def whole(cluster: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A whole study, submitted at once and left alone."""
    study = Study(cluster, tmp_path_factory.mktemp("whole"))
    said = study.submit("--all")
    assert "6 runs to submit, 0 in the queue already" in said
    assert "0 runs to submit, 6 in the queue already" in study.submit("--all")  # nothing twice
    wait_for(lambda: len(list(study.folder.glob("*.json"))) == 6, study, "base-seed0")
    return study


def test_a_study_is_done_in_the_order_of_its_dependencies(whole: Study) -> None:
    assert re.search(r"^all +6 +0 +0 +0 +0$", whole.status(), re.MULTILINE)
    assert "0 runs to submit" in whole.submit("--all")
    finished = {
        name: results.read(whole.result(name))["finished"]
        for name in ("base-seed0", "search-lambda0.01-seed0", "finetune-wkmedoids-level1-seed0")
    }
    assert list(finished.values()) == sorted(finished.values())
    learned = results.read(whole.result("search-lambda0.01-seed0"))["metrics"]["learned_keep"]
    assert results.read(whole.result("finetune-wkmedoids-level1-seed0"))["setting"]["keep"] == learned


def test_two_nodes_train_together(whole: Study) -> None:
    base = results.read(whole.result("base-seed0"))
    assert base["processes"] == 2 and base["restarts"] == 0 and base["metrics"]["images"] == 450
    assert len(base["epochs"]) == 30 and base["environment"]["slurm_job"]
    assert results.read(whole.result("search-lambda0.01-seed0"))["processes"] == 2
    assert results.read(whole.result("finetune-wkmedoids-level1-seed0"))["processes"] == 1
    assert "on n[1-2]" in whole.log("base-seed0") and "epoch 30/30" in whole.log("base-seed0")


def assert_same_base(study: Study, whole: Study) -> None:
    for first, second in zip(study.weights("base-seed0"), whole.weights("base-seed0"), strict=True):
        assert all(torch.equal(first[key], second[key]) for key in second)
    found, expected = (results.read(one.result("base-seed0"))["epochs"] for one in (study, whole))
    for first, second in zip(found, expected, strict=True):
        # The sums of both processes are put together when they are saved, which rounds otherwise than at the end.
        assert first == second | {"train_loss": pytest.approx(second["train_loss"], abs=3e-6)}


def test_signalled_jobs_are_requeued_and_end_as_uninterrupted_ones(whole: Study, cluster: Path, tmp_path: Path) -> None:
    """$TOKENPOOL_REQUEUES says how often."""
    study, run, requeues = Study(cluster, tmp_path), "base-seed0", int(os.environ.get("TOKENPOOL_REQUEUES", 2))
    job = re.search(r"as job (\d+)", study.submit("--all", "--only", run))[1]
    for number in range(requeues):
        begun = f"restart {number}, on"
        wait_for(lambda begun=begun: "training from" in study.log(run).partition(begun)[2], study, run)
        # After some batches, other ones each time.
        epoch = 2 * number + 1
        wait_for(lambda begun=begun, epoch=epoch: f"epoch {epoch}/30" in study.log(run), study, run)
        slow = second_process(study, run)  # which hears of it later, and has the first one wait
        os.kill(slow, signal.SIGSTOP)
        subprocess.run(["scancel", "--signal=USR1", f"{job}_0"], check=True)
        time.sleep(0.5)
        os.kill(slow, signal.SIGCONT)
        wait_for(lambda number=number: study.log(run).count("Slurm will continue") > number, study, run)
    wait_for(lambda: study.result(run).exists(), study, run)
    assert results.read(study.result(run))["restarts"] == requeues
    assert_same_base(study, whole)


def test_a_killed_process_is_replaced_from_the_last_checkpoint(whole: Study, cluster: Path, tmp_path: Path) -> None:
    study, run = Study(cluster, tmp_path), "base-seed0"
    study.template.write_text(study.template.read_text().replace("set -u\n", "set -u\nexport TOKENPOOL_MINUTES=0.01\n"))
    study.submit("--all", "--only", run)
    wait_for(lambda: "epoch 5/30" in study.log(run), study, run)
    os.kill(second_process(study, run), signal.SIGKILL)
    wait_for(lambda: study.result(run).exists(), study, run)
    # 137 is SIGKILL; 143 is SIGTERM, by which srun ends the other process, whose code it may report instead.
    assert re.search(r"was killed \(exit code (137|143)\) after it had saved a checkpoint: requeued", study.log(run))
    assert results.read(study.result(run))["restarts"] == 1
    assert_same_base(study, whole)


def test_a_preempted_job_goes_on_and_a_cancelled_one_does_not(whole: Study, cluster: Path, tmp_path: Path) -> None:
    study, run = Study(cluster, tmp_path), "base-seed0"
    job = re.search(r"as job (\d+)", study.submit("--all", "--only", run))[1]
    wait_for(lambda: "epoch 3/30" in study.log(run), study, run)
    urgent = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true"]
    subprocess.run(urgent, check=True, capture_output=True)
    wait_for(lambda: "waiting for Slurm to requeue or to end the job" in study.log(run), study, run)
    wait_for(lambda: "training from" in study.log(run).partition("restart 1, on")[2], study, run)

    subprocess.run(["scancel", f"{job}_0"], check=True)
    wait_for(lambda: f"failed {run}, job {job}_0" in study.status(), study, run)
    time.sleep(3)
    assert "restart 2, on" not in study.log(run)

    study.submit("--all", "--only", run)  # which goes on where the cancelled one has saved its state
    wait_for(lambda: study.result(run).exists(), study, run)
    assert results.read(study.result(run))["restarts"] == 2
    assert_same_base(study, whole)


def test_a_failed_run_is_shown_and_holds_back_what_needs_it(cluster: Path, tmp_path: Path) -> None:
    study = Study(cluster, tmp_path, rate="1e30")
    study.submit("--all")
    wait_for(lambda: re.search(r"^all +0 +0 +0 +6 +0$", study.status(), re.MULTILINE), study, "base-seed0")
    said = study.status()
    assert "failed base-seed0, job" in said and "error: the loss is" in said
    assert "failed search-lambda0.01-seed0" in said and "it never started" in said
    study.preset.write_text(study.preset.read_text().replace("1e30", "1e-3"))  # mended, and submitted again
    (study.folder / "checkpoints" / "base-seed0.ckpt").unlink(missing_ok=True)
    assert "6 runs to submit" in study.submit("--all", "--dry-run")


def test_what_slurm_would_not_take_is_said_before_anything_is_queued(cluster: Path, tmp_path: Path) -> None:
    study = Study(cluster, tmp_path)
    text = study.template.read_text().replace("##SBATCH --partition=gpu", "#SBATCH --partition=gpu")
    study.template.write_text(text)
    before = jobs()
    done = study.call("submit", "--all", "--template", str(study.template))
    assert done.returncode == 1 and "Slurm rejects" in done.stderr and "invalid partition" in done.stderr
    assert str(study.template) in done.stderr
    assert jobs() <= before  # those of the test before this one may end meanwhile


def test_slurm_runs_where_it_must(request: pytest.FixtureRequest) -> None:
    """`.ci/run` says so where it is installed: were all of these tests skipped there, nobody would notice."""
    if os.environ.get("TOKENPOOL_NEEDS_SLURM"):
        try:
            request.getfixturevalue("cluster")
        except pytest.skip.Exception as skipped:
            pytest.fail(f"skipped: {skipped}")
