import dataclasses
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import load_file

from tokenpool.analysis import results
from tokenpool.runs import execute
from tokenpool.runs.run import Run, checkpoint_path, result_path, weights_path
from tokenpool.training import interruption
from tokenpool.training.interruption import AtomicCheckpointIO, Interrupted, recorded_signals, slurm_job
from tokenpool.training.module import ClassificationModule
from tokenpool.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
TINY = {"embed_dim": 16, "depth": 3, "num_heads": 2, "patch_size": 4, "weight_init": "jax", "drop_path_rate": 0.2}
RUN = Run(
    stage="train",
    label="wkmedoids",
    data="digits",
    model="deit_digits_patch2_16",
    downsampler="wkmedoids",
    keep=(9, 4, 1),
    recipe=Recipe(
        epochs=3,
        batch_size=128,  # ten batches an epoch
        learning_rate=5e-3,
        warmup_epochs=1,
        mixup=0.8,
        cutmix=1.0,
        repeats=3,
        ema_decay=0.9,
    ),
    model_options=TINY,
)


@pytest.fixture
def kicked(monkeypatch: pytest.MonkeyPatch) -> Callable[[Run, Path, int, set[int]], int]:
    """A function that executes a run until it is done, signalled at given steps, and tells how often it began."""
    for variable in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(variable, raising=False)
    begin_batch = ClassificationModule.on_train_batch_start

    def until_done(run: Run, folder: Path, number: int, steps: set[int]) -> int:
        def kick(module: ClassificationModule, *batch: Any) -> None:
            if module.trainer.global_step + 1 in steps:
                steps.remove(module.trainer.global_step + 1)
                os.kill(os.getpid(), number)
            begin_batch(module, *batch)

        monkeypatch.setattr(ClassificationModule, "on_train_batch_start", kick)
        attempts = 0
        while True:
            attempts += 1
            try:
                execute.execute(run, folder)
                return attempts
            except Interrupted:
                assert checkpoint_path(run, folder).exists()

    return until_done


def weights(run: Run, folder: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(weights_path(name, folder)) for name in (run.name, f"{run.name}.ema")]


def epochs(run: Run, folder: Path) -> list[dict]:
    return results.read(result_path(run, folder))["epochs"]


@pytest.mark.parametrize(
    "options, steps",
    [
        # The first batch of all; around the end of an epoch, one after the other; in the middle; the last of all.
        ({}, {1, 9, 10, 11, 14, 30}),
        ({"accumulate_grad_batches": 2}, {2, 5, 6, 15}),
        ({"limit_train_batches": 6, "max_epochs": 5}, {6, 8, 30}),
    ],
    ids=["plain", "accumulated", "limited"],
)
@pytest.mark.slow
def test_a_run_stopped_again_and_again_ends_as_an_uninterrupted_one(
    tmp_path: Path, kicked, options: dict, steps: set[int]
) -> None:
    run = dataclasses.replace(RUN, trainer_options=options)
    execute.execute(run, tmp_path / "whole")
    assert kicked(run, tmp_path / "kicked", signal.SIGTERM, set(steps)) == 1 + len(steps)
    for whole, resumed in zip(weights(run, tmp_path / "whole"), weights(run, tmp_path / "kicked"), strict=True):
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert epochs(run, tmp_path / "whole") == epochs(run, tmp_path / "kicked")
    first, second = (results.read(result_path(run, tmp_path / name)) for name in ("whole", "kicked"))
    assert first["metrics"] == second["metrics"] and first["processes"] == second["processes"] == 1
    assert second["restarts"] == len(steps) and first["restarts"] == 0
    assert not checkpoint_path(run, tmp_path / "kicked").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_epoch = ClassificationModule.on_train_epoch_end

    def poison(module: ClassificationModule) -> None:
        end_epoch(module)
        if module.trainer.current_epoch == 1:
            module.model.head.bias.data[0] = torch.nan

    monkeypatch.setattr(ClassificationModule, "on_train_epoch_end", poison)
    with pytest.raises(
        FloatingPointError, match=r"not finite after step 20: .*; the last checkpoint with finite weights is"
    ):
        execute.execute(RUN, tmp_path)
    state = torch.load(checkpoint_path(RUN, tmp_path), weights_only=True)
    assert state["global_step"] == 10 and state["state_dict"]["model.head.bias"].isfinite().all()


@pytest.mark.slow
def test_an_epoch_without_validation_has_no_validation_metrics(tmp_path: Path) -> None:
    run = Run.from_setting(RUN.setting | {"epochs": 2, "trainer_options": {"check_val_every_n_epoch": 2}})
    execute.execute(run, tmp_path)
    assert ["val_top1" in epoch for epoch in epochs(run, tmp_path)] == [False, True]
    assert all("train_loss" in epoch for epoch in epochs(run, tmp_path))


def test_a_run_that_tests_no_image_is_refused(tmp_path: Path) -> None:
    run = Run.from_setting(RUN.setting | {"epochs": 1, "trainer_options": {"limit_test_batches": 0}})
    with pytest.raises(ValueError, match="no image was tested .*limit_test_batches"):
        execute.execute(run, tmp_path)


@pytest.mark.slow
def test_under_slurm_the_job_is_requeued(tmp_path: Path, kicked, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "scontrol"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    monkeypatch.setattr(interruption, "slurm_job", lambda: "12_3")
    run = Run.from_setting(RUN.setting | {"epochs": 1})
    assert kicked(run, tmp_path / "runs", signal.SIGUSR1, {4, 8}) == 3
    assert (tmp_path / "calls").read_text() == "requeue 12_3\n" * 2

    fake.write_text('#!/bin/sh\necho "Access denied" >&2\nexit 1\n')
    again = dataclasses.replace(run, seed=1)
    with pytest.raises(RuntimeError, match="Slurm does not requeue job 12_3 .Access denied.; its state is saved in"):
        kicked(again, tmp_path / "runs", signal.SIGUSR1, {4})
    assert checkpoint_path(again, tmp_path / "runs").exists()


def test_the_name_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert slurm_job() is None
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert slurm_job() == "17"
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "15")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert slurm_job() == "15_2"


def test_signals_are_noted_while_listening_only() -> None:
    outside = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored in the background of a shell
    try:
        signals_are_noted()
    finally:
        signal.signal(signal.SIGINT, outside)


def signals_are_noted() -> None:
    before, ctrl_c = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with recorded_signals() as signals:
        assert signals.request == 0 and signal.getsignal(signal.SIGTERM) is before  # until training begins
        signals.use_default_handlers()
        assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        signals.record_all()
        assert signal.getsignal(signal.SIGINT) is ctrl_c
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.request == interruption.STOP
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.request == interruption.REQUEUE
    assert signal.getsignal(signal.SIGTERM) is before


OTHER_NEVER_COMES = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
OTHER_NEVER_COMES |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "TORCHELASTIC_RUN_ID": "test"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_waits_for_the_others_ends_of_a_signal(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "experiments", "train", "--output", str(tmp_path)]
    command += ["--trainer=accelerator=cpu", "--trainer=devices=2", "--epochs=1", "--model-option=depth=1"]
    with subprocess.Popen(
        command,
        env=os.environ | OTHER_NEVER_COMES,
        cwd=ROOT,
        text=True,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored in the background of a shell
    ) as process:
        try:
            assert any("MEMBER: 1/2" in line for line in process.stderr)
            time.sleep(1)  # into the waiting itself
            assert process.poll() is None
            process.send_signal(number)
            assert process.wait(timeout=5) == -number
        finally:
            process.kill()


def test_a_blocked_signal_is_heard_when_listening_begins() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        signal.raise_signal(signal.SIGUSR1)  # to this thread, as others may not block it
        with recorded_signals() as signals:
            assert signals.request == interruption.REQUEUE
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})


def test_state_is_saved_every_so_many_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setenv("TOKENPOOL_MINUTES", "0")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", lambda trainer, path: saved.append(trainer.global_step))
        execute.execute(Run.from_setting(RUN.setting | {"epochs": 1}), tmp_path)
    assert saved == list(range(1, 11))
    monkeypatch.setenv("TOKENPOOL_MINUTES", "soon")
    with pytest.raises(ValueError, match="TOKENPOOL_MINUTES = 'soon' must be a number"):
        execute.execute(Run.from_setting(RUN.setting | {"epochs": 1}), tmp_path / "other")


def test_a_full_disk_leaves_the_checkpoint_before_it_whole(tmp_path: Path) -> None:
    """The limit on a file's size stands for a full disk: the system refuses to write on in the middle."""
    path, limit = tmp_path / "state.ckpt", resource.getrlimit(resource.RLIMIT_FSIZE)
    AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(1000)}, path)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
    try:
        with pytest.raises(OSError, match="cannot write .*state.ckpt: File too large; the old file is unchanged"):
            AtomicCheckpointIO().save_checkpoint({"weights": torch.ones(1_000_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert torch.load(path)["weights"].equal(torch.zeros(1000)) and list(tmp_path.iterdir()) == [path]


SBATCH = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NNODES": "1", "SLURM_NTASKS": "2"}
SBATCH |= {"SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
SRUN = SBATCH | {"SLURM_STEP_ID": "0"}


def devices(folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> int:
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    started = []

    def fit(trainer: Trainer, *given: Any, **options: Any) -> None:
        started.append(trainer.world_size)
        raise KeyboardInterrupt  # before it waits for other processes

    monkeypatch.setattr(Trainer, "fit", fit)
    with pytest.raises(KeyboardInterrupt):
        execute.execute(dataclasses.replace(RUN, trainer_options={"accelerator": "cpu"}), folder)
    return started[0]


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}])
def test_several_tasks_without_srun_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: dict) -> None:
    """In a batch script and in the shell of salloc."""
    with pytest.raises(ValueError, match="Slurm has 2 tasks .* put srun before the command"):
        devices(tmp_path, monkeypatch, SBATCH | step)


def test_tasks_of_slurm_are_processes_where_srun_has_started_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert devices(tmp_path, monkeypatch, SRUN) == 2
    assert devices(tmp_path, monkeypatch, SBATCH | {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}) == 1
    assert devices(tmp_path, monkeypatch, SBATCH | {"SLURM_JOB_NAME": "interactive"}) == 1  # not Slurm, for Lightning
    with pytest.raises(ValueError, match="3 tasks on 2 nodes, but each node needs as many"):
        devices(tmp_path, monkeypatch, SRUN | {"SLURM_NTASKS": "3", "SLURM_NNODES": "2"})


@pytest.mark.parametrize(("system", "unit"), [("linux", 2**10), ("darwin", 1)])
@pytest.mark.slow
def test_peak_memory_is_in_gib_on_every_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, system: str, unit: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "platform", system)
    run = dataclasses.replace(RUN, trainer_options={"limit_train_batches": 1, "max_epochs": 1})
    used = execute.execute(run, tmp_path)["peak_memory_gib"]
    assert used == pytest.approx(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, rel=0.1)
