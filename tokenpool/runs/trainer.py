"""Lightning's Trainer for one run: on one machine, under torchrun or under Slurm; and training from a checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tokenpool.runs import loggers
from tokenpool.runs.record import EpochReporter
from tokenpool.runs.run import Run, check_stored
from tokenpool.training.callbacks import FlopsCallback
from tokenpool.training.interruption import AtomicCheckpointIO

SLURM_RESERVED = 0xFFFFFFF0  # numbers of steps from here on mean a batch script, an interactive shell, and so on


def create(
    run: Run, folder: Path, callbacks: list[Callback], on_epoch: Callable[[], None] | None, progress: bool
) -> Trainer:
    """The Trainer of a run.

    Args:
        run: the run.
        folder: for logs.
        callbacks: of the run; others are appended.
        on_epoch: called after each epoch of training.
        progress: show Lightning's progress bar.

    Raises:
        ValueError: if Lightning does not take the run's `trainer_options`, or if Slurm's tasks do not fit.
    """
    if run.recipe.epochs:
        callbacks.append(FlopsCallback())
    if on_epoch:
        callbacks.append(EpochReporter(on_epoch))
    defaults = {
        "max_epochs": run.recipe.epochs or 1,
        "logger": loggers.create(run.name, folder) if run.recipe.epochs else False,
        "default_root_dir": folder,
        "enable_progress_bar": progress,
        "enable_model_summary": progress,
        "enable_checkpointing": True,
        "log_every_n_steps": 50,
        "deterministic": "warn",
        "num_sanity_val_steps": 0,
        "plugins": [AtomicCheckpointIO()],
    }
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # Lightning's own requeueing can hang (its issue 21406).
        nodes, tasks = _slurm_nodes_and_tasks()
        defaults |= {"num_nodes": nodes, "devices": tasks // nodes}
        defaults["plugins"].append(SLURMEnvironment(auto_requeue=False))
    try:
        return Trainer(callbacks=callbacks, **defaults | run.trainer_options)
    except (TypeError, ValueError, ImportError, MisconfigurationException) as error:
        raise ValueError(f"Lightning's Trainer does not take these options: {error}") from error


def _slurm_nodes_and_tasks() -> tuple[int, int]:
    """Numbers of nodes and tasks that sbatch or srun was asked for.

    Raises:
        ValueError: if there are several tasks and `srun` has not started this process, so that the others would never
            come; or if the nodes have different numbers of tasks.
    """
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    tasks = int(os.environ.get("SLURM_NTASKS", nodes))
    if tasks > 1 and not _is_task_of_srun():
        raise ValueError(
            f"Slurm has {tasks} tasks for this job (SLURM_NTASKS), but srun has not started this process, and the "
            "others would never come: put srun before the command; for a single process, srun --ntasks=1 --nodes=1"
        )
    if tasks % nodes:
        raise ValueError(
            f"Slurm has {tasks} tasks on {nodes} nodes, but each node needs as many as the others: "
            "use --nodes and --ntasks-per-node"
        )
    return nodes, tasks


def _is_task_of_srun() -> bool:
    """Whether srun started this process as a task of a step.

    Batch scripts and shells of salloc have no number of a step, or a reserved one.
    """
    step = os.environ.get("SLURM_STEP_ID", os.environ.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < SLURM_RESERVED and "SLURM_PROCID" in os.environ


def fit(
    trainer: Trainer,
    module: LightningModule,
    data: LightningDataModule,
    run: Run,
    checkpoint: Path,
    identity: dict[str, str],
) -> None:
    """Train; go on from the checkpoint if it exists.

    Raises:
        KeyboardInterrupt: if the user stops it.
        Interrupted: if a signal does.
        ValueError: if the checkpoint cannot be read, or is of another setting, other images or other weights; the
            message names it.
        FloatingPointError: if the loss is not finite; the message says where to go on.
    """
    if checkpoint.exists():
        try:
            before = torch.load(checkpoint, map_location="cpu", weights_only=True)
            stored = {"setting": before["run"], "identity": before.get("identity")}
        except Exception as error:
            raise ValueError(f"cannot read checkpoint {checkpoint} ({error}); delete it to start anew") from error
        check_stored(run, stored, identity, checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint if checkpoint.exists() else None)
    except SystemExit as error:  # Lightning raises it at an interrupt
        if trainer.interrupted:
            raise KeyboardInterrupt from error
        raise
    except FloatingPointError as error:
        last = (
            f"the last checkpoint with finite weights is {checkpoint}"
            if checkpoint.exists()
            else "there is no checkpoint yet"
        )
        raise FloatingPointError(f"{error}; {last}. Try a lower learning rate") from error
