import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

if not torch.cuda.is_available():  # the kernels then run in Triton's interpreter; timm already imports Triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

import timm
from timm.models.vision_transformer import VisionTransformer

from tokenpool import files, gpu

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(files.CACHE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def shared() -> Path:
    """Photographs, weights and the paper's tables, which are not part of the repository."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with photographs and weights, which is not here")
    return SHARED


@pytest.fixture(scope="session")
def triton_runs() -> None:
    """Triton, on a GPU or in its interpreter."""
    if not gpu.available:
        pytest.skip("Triton is not installed")
    if torch.cuda.is_available():
        return
    if not gpu.INTERPRETED.value:
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    import triton

    counted = torch.zeros(1, dtype=torch.int32)
    try:  # Triton 3.4's does not go with NumPy 2.4, for instance
        triton.jit(_count)[(1,)](counted, 3)
    except Exception as error:
        if "only 0-dimensional arrays" not in str(error):
            raise
        pytest.skip(f"the interpreter of Triton {triton.__version__} fails on the simplest loop: {error}")
    assert counted.item() == 3


def _count(counted, n):
    import triton.language as tl

    for _ in range(n):
        tl.store(counted, tl.load(counted) + 1)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., CompletedProcess]:
    """`python -m experiments ARGUMENTS` without a new Python, whose imports take seconds."""
    from experiments.__main__ import main

    def run(*arguments: str) -> CompletedProcess:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
        capsys.readouterr()
        code, before = None, dict(os.environ)
        try:
            with torch.random.fork_rng():
                main()
        except SystemExit as stopped:
            code = stopped.code
        finally:
            os.environ.clear()
            os.environ.update(before)
        printed = capsys.readouterr()
        said = f"{printed.err}{code}\n" if isinstance(code, str) else printed.err  # what Python does with a text
        return CompletedProcess(arguments, 1 if isinstance(code, str) else code or 0, printed.out, said)

    return run


@pytest.fixture
def small() -> VisionTransformer:
    """A small DeiT with random weights that are large enough for attention to have a shape."""
    torch.manual_seed(0)
    model = timm.create_model("deit_tiny_patch16_224", img_size=96, embed_dim=48, depth=4, num_heads=3, num_classes=7)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture
def photos() -> torch.Tensor:
    """Noise of the size that `small` takes: 36 patches an image."""
    return torch.randn(5, 3, 96, 96, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """The folder of a real Slurm that runs meanwhile: two nodes of two processors.

    Its `template.sh` is the repository's, with one node and one task and no GPU.
    """
    absent = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name)]
    if absent:
        pytest.skip(f"needs Slurm (Debian: slurm-wlm, munge); not installed: {', '.join(absent)}")
    if os.geteuid():
        pytest.skip("needs root, to start Slurm's daemons")
    scripts = ROOT / "tests" / "slurm"
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name)
        subprocess.run([scripts / "start.sh", folder], check=True, stdin=subprocess.DEVNULL)
        try:
            template = (ROOT / "experiments" / "slurm" / "template.sh").read_text()
            template = re.sub("#SBATCH --(gpus-per-node|mem)=.*\n", "", template)
            template = re.sub("#SBATCH --(ntasks-per-node|cpus-per-task)=.*", r"#SBATCH --\1=1", template)
            # Nobody resolves the names of the nodes, of which Lightning takes the first one as the address.
            template = template.replace("# module load cuda", "export MASTER_ADDR=127.0.0.1 OMP_NUM_THREADS=1")
            (folder / "template.sh").write_text(template)
            patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
            yield folder
        finally:
            subprocess.run([scripts / "stop.sh", folder], check=True, stdin=subprocess.DEVNULL)


@pytest.fixture(scope="session")
def browser() -> Callable[[Path], str]:
    """A function of an HTML file: the document as HTML after Chromium ran its scripts."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium, which is not installed")
    options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=2000", "--dump-dom")

    def run(path: Path) -> str:
        with tempfile.TemporaryDirectory() as profile:
            command = [program, *options, f"--user-data-dir={profile}", path.as_uri()]
            return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout

    return run
