"""Read every image of a data set before a long training does, and name those that cannot be read."""

import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tokenpool import files
from tokenpool.training.images import HUB, Images, is_downloaded, load_image, open_images

PARTS = ("train", "val")

_CHUNK = 16  # images that a process reads at a time: of a few megabytes, and in a fraction of a second
_SECONDS = 2  # between two notes of how far it has come


def check_data(
    data: str,
    parts: Sequence[str] = PARTS,
    jobs: int = 1,
    output: Path | None = None,
    allow_empty: bool = False,
    allow_truncated: bool = False,
) -> Iterator[str]:
    """Decode all images in `jobs` processes; what comes out are lines to print, and a JSON file.

    How far it has come stands in `<output>.progress` meanwhile, from where the next call goes on. Images that could not
    be read are tried again by each call. Everything is read again if an image came, went or changed since.

    Args:
        data: see `tokenpool.training.images.open_images`.
        parts: "train" and "val", or one of them.
        jobs: number of processes.
        output: the file; it is there when all images have been tried. Default: in `runs/check-data/`.
        allow_empty: see `tokenpool.training.images.open_images`.
        allow_truncated: see `tokenpool.training.images.load_image`.

    Raises:
        ValueError: at the end, if an image cannot be read or if train and val have different classes; and if the data
            cannot be opened.
    """
    allowed = {"allow_empty": allow_empty, "allow_truncated": allow_truncated}
    opened = {part: open_images(data, part, **allowed) for part in parts}
    output = output or _default_output(data, parts)
    for part, images in opened.items():
        yield f"{part}: {_summary(images)}"
    differences = _differences(opened)
    yield from differences
    bad = _read_all(opened, jobs, output)
    yield from (entry["reason"] for entry in bad)
    total = sum(map(len, opened.values()))
    yield f"report: {output}"
    if bad or differences:
        wrong = [f"{len(bad)} of {total} images cannot be read"] if bad else []
        raise ValueError("; ".join(wrong + ["train and val have different classes"] * bool(differences)))
    yield f"all {total} images can be read"


def _summary(images: Images) -> str:
    counts = np.bincount(images.labels, minlength=len(images.classes))
    return f"{len(images)} images of {len(images.classes)} classes, {counts.min()} to {counts.max()} a class"


def _differences(opened: dict[str, Images]) -> list[str]:
    """Lines on how the classes of train and val differ."""
    if len(opened) < 2:
        return []
    train, val = (opened[part].classes for part in PARTS)
    lines = []
    for part, classes, other in (("train", train, set(val)), ("val", val, set(train))):
        only = [name for name in classes if name not in other]
        if only:
            lines.append(f"classes of {part} only: {', '.join(only)}")
    return lines or (["the classes of train and val have different numbers"] if train != val else [])


def _read_all(opened: dict[str, Images], jobs: int, output: Path) -> list[dict[str, Any]]:
    """What could not be read: part, index, stamp and reason of each."""
    progress = output.with_name(output.name + ".progress")
    before = _read_json(progress) or _read_json(output) or {"bad": []}
    fingerprint = _fingerprint(opened, before["bad"])
    if before.get("fingerprint") != fingerprint:
        before = {"done": 0, "bad": []}
        output.unlink(missing_ok=True)  # it tells of other images
    # The images are counted through, train first. The first `done` have been tried; `retry` are those to try again.
    state = {"fingerprint": fingerprint, "done": before["done"], "bad": [], "retry": before["bad"]}
    total, noted, interval = sum(map(len, opened.values())), time.monotonic(), 0.5 if sys.stderr.isatty() else 15
    bar = tqdm(total=total, initial=state["done"] - len(state["retry"]), unit="image", mininterval=interval)
    try:
        with bar, closing(_attempts(opened, state, jobs)) as attempts:
            for chunk, reasons in attempts:
                state = _after(state, opened, chunk, reasons)  # at once: an interrupt sees it before or after
                bar.update(len(chunk))
                if time.monotonic() - noted > _SECONDS:
                    _write_json(_to_go_on_from(state), progress)
                    noted = time.monotonic()
    except BaseException:
        _write_json(_to_go_on_from(state), progress)
        raise
    counts = {part: {"images": len(images), "classes": len(images.classes)} for part, images in opened.items()}
    _write_json(_to_go_on_from(state) | counts, output)
    progress.unlink(missing_ok=True)
    return state["bad"]


def _after(
    state: dict[str, Any], opened: dict[str, Images], chunk: list[tuple[str, int]], reasons: list[str | None]
) -> dict[str, Any]:
    """The state after some images have been tried: the first of those to be tried again, or else the next ones."""
    stamps = [f"{part} {opened[part].stamp(index)}" for part, index in chunk]
    bad = [
        {"part": part, "index": index, "stamp": stamp, "reason": reason}
        for (part, index), stamp, reason in zip(chunk, stamps, reasons, strict=True)
        if reason is not None
    ]
    state = state | {"bad": state["bad"] + bad}
    if not state["retry"]:
        return state | {"done": state["done"] + len(chunk)}
    tried, left = state["retry"][: len(chunk)], state["retry"][len(chunk) :]
    change = sum(map(_digest, stamps)) - sum(_digest(entry["stamp"]) for entry in tried)  # by which they were mended
    return state | {"retry": left, "fingerprint": _as_text(int(state["fingerprint"], 16) + change)}


def _to_go_on_from(state: dict[str, Any]) -> dict[str, Any]:
    """What is written: all that is not known to be good counts as bad."""
    return {"fingerprint": state["fingerprint"], "done": state["done"], "bad": state["bad"] + state["retry"]}


def _attempts(
    opened: dict[str, Images], state: dict[str, Any], jobs: int
) -> Iterator[tuple[list[tuple[str, int]], list[str | None]]]:
    """Part and index of some images at a time, in order, and for each the reason why it cannot be read, or None."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not by each process
    executor = ProcessPoolExecutor(jobs, context, initializer=_start_worker)
    waiting = deque()
    try:
        for chunk in _chunks(opened, state):
            sources = [(*opened[part].source(index), opened[part].allow_truncated) for part, index in chunk]
            waiting.append((chunk, _submit(executor, sources)))
            if len(waiting) > 4 * jobs:  # what waits lies in memory
                yield _outcome(*waiting.popleft())
        while waiting:
            yield _outcome(*waiting.popleft())
        executor.shutdown()
    finally:
        executor.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.kill()


def _chunks(opened: dict[str, Images], state: dict[str, Any]) -> Iterator[list[tuple[str, int]]]:
    """First the images to be tried again, then all that have not been tried, a few at a time."""
    again = [(entry["part"], entry["index"]) for entry in state["retry"]]
    yield from (again[first : first + _CHUNK] for first in range(0, len(again), _CHUNK))
    start = state["done"]
    for part, images in opened.items():
        for first in range(start, len(images), _CHUNK):
            yield [(part, index) for index in range(first, min(first + _CHUNK, len(images)))]
        start = max(start - len(images), 0)


def _submit(executor: ProcessPoolExecutor, sources: list[tuple[Path | bytes, str, bool]]) -> Future:
    """Start the work, and processes for it if need be; a Ctrl-C meanwhile takes effect when they are known."""
    pressed = []
    handler = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it, and never hear a Ctrl-C
    try:
        return executor.submit(_reasons, sources)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if pressed:
            raise KeyboardInterrupt


def _outcome(chunk: list[tuple[str, int]], future: Future) -> tuple[list[tuple[str, int]], list[str | None]]:
    try:
        return chunk, future.result()
    except BrokenProcessPool as error:
        (part, index) = chunk[0]
        raise RuntimeError(f"a process died near image {index} of {part}, of damage or of lack of memory") from error


def _reasons(sources: list[tuple[Path | bytes, str, bool]]) -> list[str | None]:
    """In a worker: why each image cannot be read; None if it can."""
    reasons = []
    for source in sources:
        try:
            load_image(*source)
            reasons.append(None)
        except ValueError as error:
            reasons.append(str(error))
    return reasons


def _start_worker() -> None:
    threading.Thread(target=_die_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")  # of Pillow, on what it can read nevertheless


def _die_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _fingerprint(opened: dict[str, Images], bad: list[dict[str, Any]]) -> str:
    """Of all names, sizes and times; of what was bad, those that it had then, so that it can be mended alone.

    A sum of hashes, so that one image's share can be taken out and another one put in.
    """
    known = {(entry["part"], entry["index"]): entry["stamp"] for entry in bad}
    total = _digest(str([(part, len(images)) for part, images in opened.items()]))
    total += sum(_digest(f"{part} allows truncated images") for part in opened if opened[part].allow_truncated)
    for part, images in opened.items():
        for index in tqdm(range(len(images)), desc=f"list of {part}", unit="image", leave=False, delay=2):
            total += _digest(known.get((part, index)) or f"{part} {images.stamp(index)}")
    return _as_text(total)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode(errors="surrogateescape")).digest())


def _as_text(number: int) -> str:
    return f"{number % 2**256:064x}"


def _default_output(data: str, parts: Sequence[str]) -> Path:
    source = data if data.startswith(HUB) or is_downloaded(data) else str(Path(data).resolve())
    name = re.sub("[^A-Za-z0-9]+", "-", source).strip("-")[-60:]
    told_apart = hashlib.sha256(" ".join([source, *parts]).encode(errors="surrogateescape")).hexdigest()[:8]
    return Path("runs/check-data") / f"{name}-{told_apart}.json"


def _read_json(path: Path) -> dict[str, Any] | None:
    """What the file holds; None if it is missing or no file of this program, and then everything is read anew."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return content if isinstance(content, dict) and {"fingerprint", "done", "bad"} <= set(content) else None


def _write_json(content: dict[str, Any], path: Path) -> None:
    with files.atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")
