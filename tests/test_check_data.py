import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tokenpool.tools import check_data
from tokenpool.tools.check_data import check_data as checked

ROOT = Path(__file__).parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """40 training images and 6 others, of two classes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 3)):
        for name in ("green", "red"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = Image.fromarray(random.integers(0, 255, (9, 8, 3), dtype=np.uint8))
                pixels.save(tmp_path / "images" / part / name / f"{index:02}.png")
    return tmp_path / "images"


def lines(folder: Path | str, output: Path, parts: tuple[str, ...] = ("train", "val")) -> tuple[list[str], str]:
    """What is printed, and the error at the end."""
    printed = []
    try:
        for line in checked(str(folder), parts, 1, output):
            printed.append(line)
    except ValueError as error:
        return printed, str(error)
    return printed, ""


class InProcess:
    """In place of a pool of processes. The work is done in this process, when its result is asked for."""

    def __init__(self, names: list[str], before: list[Callable[[], None]]) -> None:
        self.names, self.before = names, before

    def submit(self, work: Callable, sources: list) -> SimpleNamespace:
        self.names.extend("/".join(Path(name).parts[-3:]) for _, name, _ in sources)

        def result() -> list[str | None]:
            for step in self.before:
                step()
            return work(sources)

        return SimpleNamespace(result=result)

    def shutdown(self, **options: object) -> None:
        pass


@pytest.fixture
def before_result() -> list[Callable[[], None]]:
    """What is called before images are read, some at a time."""
    return []


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, before_result: list[Callable[[], None]]) -> list[str]:
    """Names of the images that are read, in this process."""
    names = []
    monkeypatch.setattr(check_data, "ProcessPoolExecutor", lambda *given, **options: InProcess(names, before_result))
    return names


def test_good_and_bad_images(folder: Path, tmp_path: Path, read: list[str]) -> None:
    output = tmp_path / "runs" / "report.json"
    printed, error = lines(folder, output)
    assert printed == [
        "train: 40 images of 2 classes, 20 to 20 a class",
        "val: 6 images of 2 classes, 3 to 3 a class",
        f"report: {output}",
        "all 46 images can be read",
    ]
    assert error == "" and len(set(read)) == len(read) == 46
    report = json.loads(output.read_text())
    assert report["done"] == 46 and report["bad"] == [] and report["train"] == {"images": 40, "classes": 2}

    read.clear()
    assert lines(folder, output) == (printed, "") and read == []  # it is known already

    (folder / "train" / "red" / "07.png").write_bytes(b"no image")
    (folder / "val" / "green" / "01.png").write_bytes(b"")
    printed, error = lines(folder, output)
    assert error == "2 of 46 images cannot be read" and len(read) == 46  # the folder is not what it was
    assert printed[2:4] == [
        f"cannot read image {folder}/train/red/07.png: Pillow does not know its format",
        f"cannot read image {folder}/val/green/01.png: it is empty",
    ]
    assert json.loads(output.read_text())["done"] == 46


def test_bad_images_are_tried_again_alone(folder: Path, tmp_path: Path, read: list[str]) -> None:
    output = tmp_path / "report.json"
    paths = [folder / "train" / "red" / "07.png", folder / "val" / "green" / "01.png"]
    whole = [path.read_bytes() for path in paths]
    for path in paths:
        path.write_bytes(b"no image")
    lines(folder, output)
    for number, path in enumerate(paths):
        path.write_bytes(whole[number])
        read.clear()
        _, error = lines(folder, output)
        assert read == ["train/red/07.png", "val/green/01.png"][number:]
        assert error == ["1 of 46 images cannot be read", ""][number]
    read.clear()
    assert lines(folder, output)[1] == "" and read == []
    path.write_bytes(b"no image again")  # one that was mended is watched like all others
    assert lines(folder, output)[1] == "1 of 46 images cannot be read" and len(read) == 46


def test_classes_that_differ(folder: Path, tmp_path: Path, read: list[str]) -> None:
    (folder / "train" / "red").rename(folder / "train" / "blue")
    (folder / "train" / "green" / "00.png").unlink()
    printed, error = lines(folder, tmp_path / "report.json")
    assert printed[0] == "train: 39 images of 2 classes, 19 to 20 a class"
    assert printed[2:4] == ["classes of train only: blue", "classes of val only: red"]
    assert error == "train and val have different classes"
    assert lines(folder, tmp_path / "val.json", ("val",))[1] == ""


def test_links_to_nothing_are_bad_images(folder: Path, tmp_path: Path, read: list[str]) -> None:
    path, output = folder / "train" / "red" / "07.png", tmp_path / "report.json"
    whole = path.read_bytes()
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere.png")
    printed, error = lines(folder, output)
    reason = f"cannot read image {path}: it is a link to {tmp_path / 'elsewhere.png'}, which does not exist"
    assert printed[2] == reason and error == "1 of 46 images cannot be read"
    assert json.loads(output.read_text())["bad"][0]["index"] == 27
    (tmp_path / "elsewhere.png").write_bytes(whole)
    read.clear()
    assert lines(folder, output)[1] == "" and read == ["train/red/07.png"]


def test_truncated_images_and_empty_classes_can_be_allowed(folder: Path, tmp_path: Path, read: list[str]) -> None:
    path, output = folder / "val" / "red" / "01.jpg", tmp_path / "report.json"
    Image.new("RGB", (64, 64), "teal").save(path)
    path.write_bytes(path.read_bytes()[:-2])
    (folder / "val" / "blue").mkdir()
    (folder / "train" / "blue").mkdir()
    with pytest.raises(FileNotFoundError, match=r"1 of the 3 class folders .*: blue\. .*--allow-empty-classes"):
        list(checked(str(folder), output=output))
    allowed = {"allow_empty": True, "allow_truncated": True}
    assert "of 3 classes, 0 to 20 a class" in "".join(checked(str(folder), output=output, **allowed))
    assert len(read) == 47
    with pytest.raises(ValueError, match="^1 of 47 images cannot be read"):  # the report of before is not believed
        list(checked(str(folder), output=output, allow_empty=True))


def test_interrupted_anywhere_it_goes_on(
    folder: Path, tmp_path: Path, read: list[str], before_result: list[Callable[[], None]]
) -> None:
    """Every image is read once, and nothing bad is forgotten, wherever it was stopped."""
    for name in ("green/01.png", "red/04.png"):
        (folder / "train" / name).write_bytes(b"no image")
    output = tmp_path / "report.json"

    def interrupted() -> None:
        if stop.pop():
            raise KeyboardInterrupt

    before_result.append(interrupted)
    # After 16 images; after the bad one of these, tried again, and 16 more; before the two bad ones are tried again.
    for stops in ([True, False], [True, False, False], [True]):  # from the end
        stop = stops
        with pytest.raises(KeyboardInterrupt):
            lines(folder, output)
        assert not output.exists()
    progress = json.loads((tmp_path / "report.json.progress").read_text())
    assert progress["done"] == 32 and [entry["index"] for entry in progress["bad"]] == [1, 24]
    stop = [False] * 100
    read.clear()
    printed, error = lines(folder, output)
    assert error == "2 of 46 images cannot be read" and "01.png" in printed[2] and "04.png" in printed[3]
    assert len(read) == 46 - 32 + 2 and not (tmp_path / "report.json.progress").exists()


def test_progress_is_noted_meanwhile(
    folder: Path, tmp_path: Path, read: list[str], before_result: list[Callable[[], None]], monkeypatch
) -> None:
    """So that what ends it without a word (lack of memory, a power cut) costs seconds."""
    progress, done = tmp_path / "report.json.progress", []

    def watched() -> None:
        done.append(json.loads(progress.read_text())["done"] if progress.exists() else 0)

    before_result.append(watched)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", itertools.count(step=10).__next__)  # ten seconds from one look to the next
        lines(folder, tmp_path / "report.json")
    assert done == [0, 16, 32, 40]


def test_files_of_others_are_not_believed(folder: Path, tmp_path: Path, read: list[str]) -> None:
    output = tmp_path / "report.json"
    for content in ("{", "[]", '{"done": 46}'):
        output.write_text(content)
        read.clear()
        assert lines(folder, output)[1] == "" and len(read) == 46


def test_hugging_face(folder: Path, tmp_path: Path, read: list[str]) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["green", "red"])

    def split(part: str) -> object:
        paths = sorted((folder / part).rglob("*.png"))
        images = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        columns = {"image": images, "label": [path.parent.name for path in paths]}
        return datasets.Dataset.from_dict(columns, datasets.Features({"image": datasets.Image(), "label": label}))

    (folder / "val" / "red" / "02.png").write_bytes(b"no image")
    datasets.DatasetDict({"train": split("train"), "test": split("val")}).save_to_disk(tmp_path / "hub")
    for _ in range(2):
        read.clear()
        printed, error = lines(f"hf:{tmp_path / 'hub'}", tmp_path / "report.json")
        assert error == "1 of 46 images cannot be read"
        assert printed[2].startswith(f"cannot read image 5 of test of hf:{tmp_path}/hub (02.png): ")
    assert len(read) == 1


def command(folder: Path, output: Path) -> subprocess.Popen:
    arguments = ["check-data", "--data", str(folder), "--jobs", "1", "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments", *arguments],
        env=environment,
        cwd=output.parent,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # so that, as in a terminal, its workers get Ctrl-C, too
        # A shell has what it starts in the background ignore Ctrl-C, and what that starts, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def writer(pipe: Path) -> int | None:
    """The pipe, opened for writing; None if nobody reads it."""
    try:
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def wait_for(condition: object) -> object:
    deadline = time.monotonic() + 300  # on a busy machine
    while (value := condition()) is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert value is not None
    return value


@pytest.mark.slow
def test_ctrl_c(folder: Path, tmp_path: Path, read: list[str]) -> None:
    pipe = folder / "train" / "red" / "19.png"  # an image whose reading takes as long as this test likes
    pipe.unlink()
    os.mkfifo(pipe)
    output = tmp_path / "report.json"
    process = command(folder, output)
    held = wait_for(lambda: writer(pipe))  # now a worker reads it
    time.sleep(1)  # the images before it have been read, and the main process hears of that
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    assert error.splitlines()[-1] == "interrupted; the same command goes on where this one stopped"
    os.close(held)
    wait_for(lambda: writer(pipe) is None or None)  # no worker is left
    assert not output.exists() and json.loads(Path(f"{output}.progress").read_text())["done"] == 32

    threading.Thread(target=lambda: os.close(wait_for(lambda: writer(pipe)))).start()
    printed, error = lines(folder, output)
    assert error == "1 of 46 images cannot be read" and f"cannot read image {pipe}: " in printed[2]
    assert json.loads(output.read_text())["done"] == 46
    assert len(read) == 46 - 32 and "train/green/00.png" not in read  # it went on


def test_an_image_that_was_exchanged_is_read_again(folder: Path, tmp_path: Path, read: list[str]) -> None:
    """By one of the same size, with the times of the old one."""
    output = tmp_path / "report.json"
    lines(folder, output)
    first = folder / "train" / "green" / "00.png"
    before = first.stat()
    first.write_bytes(b"x" * before.st_size)
    os.utime(first, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert lines(folder, output)[1] == "1 of 46 images cannot be read"
