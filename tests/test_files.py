import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tokenpool import files

SOURCES = str(Path(files.__file__).parent)  # `import files` spares a child process the seconds that PyTorch takes


def test_a_file_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file"
    with files.atomic_write(path) as temporary:
        temporary.write_text("first")
        assert not path.exists()
    with pytest.raises(TypeError), files.atomic_write(path) as temporary, open(temporary, "w") as file:
        json.dump(["second", object()], file)  # fails after it has written
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_two_writers_of_one_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with files.atomic_write(path) as first, files.atomic_write(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first" and list(tmp_path.iterdir()) == [path]  # the outer one ends last


def test_processes_and_threads_write_one_path_at_once(tmp_path: Path) -> None:
    """Whatever is read meanwhile is what one of them has written, whole, and nobody fails."""
    path = tmp_path / "file"
    script = f"""
import os, sys, threading
sys.path.insert(0, {SOURCES!r})
import files
def write(text):
    for _ in range(40):
        with files.atomic_write({str(path)!r}) as temporary:
            temporary.write_text(text * 50_000)
threads = [threading.Thread(target=write, args=(text,)) for text in sys.argv[1]]
threading.excepthook = lambda found: (print(found.exc_value, file=sys.stderr), os._exit(1))
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""
    writers = [subprocess.Popen([sys.executable, "-c", script, text], stderr=subprocess.PIPE) for text in ("ab", "cd")]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            text = path.read_text()
            assert len(text) == 50_000 and len(set(text)) == 1
            seen.add(text[0])
    assert [writer.communicate()[1] for writer in writers] == [b"", b""] and seen <= set("abcd")
    assert [writer.returncode for writer in writers] == [0, 0] and list(tmp_path.iterdir()) == [path]


def test_what_killed_writers_have_left_does_not_pile_up(tmp_path: Path) -> None:
    path, other = tmp_path / "file", tmp_path / "file.json"
    script = f"""
import os, sys
sys.path.insert(0, {SOURCES!r})
import files
with files.atomic_write({str(path)!r}) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    (left,) = tmp_path.iterdir()
    with files.atomic_write(path) as temporary:
        temporary.write_text("whole")
    assert set(tmp_path.iterdir()) == {path, left}  # which may be another writer's
    before = left.stat().st_mtime - 2 * files.STALE_AFTER
    os.utime(left, (before, before))
    with files.atomic_write(path) as temporary, files.atomic_write(other) as longer:
        temporary.write_text("whole")
        longer.write_text("another file")
        assert not left.exists()
        files.delete(path)  # and nothing of the file whose name begins alike
        assert longer.exists() and not temporary.exists()
        temporary.write_text("whole")
    assert set(tmp_path.iterdir()) == {path, other}


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with files.atomic_write(tmp_path / "text") as temporary:
            temporary.write_text("text")
        with files.atomic_write(tmp_path / "tensors") as temporary:
            safetensors.torch.save_file({"a": torch.zeros(1)}, temporary)
        with files.atomic_write(tmp_path / "state") as temporary:
            torch.save({"a": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}
