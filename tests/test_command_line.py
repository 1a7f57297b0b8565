"""`python -m experiments`: what it inherits, prints and refuses."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_a_backend_of_matplotlib_that_the_shell_names_is_not_used(tmp_path: Path) -> None:
    """Jupyter leaves its own in the variable, for all that is started from a notebook."""
    done = subprocess.run(
        [sys.executable, "-m", "experiments", "figure", "2", "--output", str(tmp_path)],
        env=os.environ | {"MPLBACKEND": "unknown"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "digits" / "figure-2.png").stat().st_size > 10_000


def test_a_notebook_keeps_its_backend() -> None:
    script = (
        "import experiments.__main__, experiments.figures, experiments.report, experiments.speed, matplotlib, os\n"
        "print(matplotlib.get_backend(), os.environ['MPLBACKEND'])"
    )
    environment = os.environ | {"MPLBACKEND": "svg"}
    said = subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.split() == ["svg", "svg"], said.stderr


def test_a_table_is_printed_as_it_is_written(in_process, tmp_path: Path) -> None:
    done = in_process("table", "5", "--output", str(tmp_path))
    assert done.returncode == 0
    written = sorted((tmp_path / "digits").glob("*.md"))
    assert len(written) == 2
    for path in written:
        assert f"{path.read_text()}\n" in done.stdout and str(path) in done.stdout
