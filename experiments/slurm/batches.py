"""Whether a job script can split the batches of its runs between the processes that train one model."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from tokenpool.runs.run import Run


def check_batches(runs: Sequence[Run], script: str, template: Path) -> None:
    """Check that each batch can be split equally between the processes that train one model.

    Raises:
        ValueError: if not. The message names the template.
    """
    nodes, tasks = _number(script, "--nodes", "-N"), _number(script, "--ntasks-per-node")
    if not tasks and _number(script, "--ntasks", "-n"):
        raise ValueError(f"{template} has --ntasks: use --ntasks-per-node instead")
    nodes, tasks = nodes or 1, tasks or 1
    for run in runs:
        recipe = run.recipe
        pairs = 2 if recipe.mixup or recipe.cutmix else 1
        if recipe.epochs and recipe.batch_size % (nodes * tasks * pairs):
            raise ValueError(
                f"{template} requests {nodes} x {tasks} tasks, but the batch of {recipe.batch_size} images of "
                f"{run.name} cannot be split equally{', in pairs for mixup' if pairs > 1 else ''}"
            )


def _number(script: str, *names: str) -> int:
    """Return the value of the last #SBATCH option with one of these names in a script, or 0."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    words = [word for line in lines for word in shlex.split(line.removeprefix("#SBATCH"), comments=True)]
    pairs = [(word, following) for word, following in zip(words, [*words[1:], ""], strict=True)]
    pairs += [tuple(word.split("=", 1)) for word in words if "=" in word]
    pairs += [(word[:2], word[2:]) for word in words if not word.startswith("--")]
    found = [value for name, value in pairs if name in names and value.isdecimal()]
    return int(found[-1]) if found else 0
