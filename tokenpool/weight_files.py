"""Read files of weights, and find the weights that match a model. No code in a file is executed."""

import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn

from tokenpool import hosts


class StandIn:
    """Placeholder for an object in a file that is not a tensor and not needed. It accepts any arguments and state."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "StandIn":
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _empty_dict(*args: Any) -> dict:
    return {}


# Objects that training scripts save beside tensors. They become placeholders, because `weights_only` forbids them.
_BESIDE_TENSORS = """
argparse.Namespace types.SimpleNamespace
pathlib.Path pathlib.PurePath pathlib.PosixPath pathlib.PurePosixPath pathlib.WindowsPath pathlib.PureWindowsPath
pathlib._local.Path pathlib._local.PurePath pathlib._local.PosixPath pathlib._local.PurePosixPath
pathlib._local.WindowsPath pathlib._local.PureWindowsPath
numpy.dtype numpy.ndarray numpy.core.multiarray.scalar numpy.core.multiarray._reconstruct
numpy._core.multiarray.scalar numpy._core.multiarray._reconstruct numpy._core.numeric._frombuffer
datetime.datetime datetime.date datetime.time datetime.timedelta datetime.timezone uuid.UUID
builtins.list builtins.dict builtins.int builtins.float builtins.str builtins.frozenset builtins.slice
torch.torch_version.TorchVersion torch._C.Generator
""".split()
_ALLOWED: list[Any] = [*((StandIn, name) for name in _BESIDE_TENSORS), (_empty_dict, "collections.defaultdict")]


def read(path: Path) -> Any:
    """Read a file of safetensors or of `torch.save`. Objects that are not tensors become placeholders.

    Args:
        path: path of the file.

    Returns:
        The content of the file, usually a dictionary.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a file of weights, is damaged, or has objects that are not known to be safe.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder, not a file of weights{_files_in(path)}")
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}")
    if other := _other_kind(path):
        raise ValueError(f"cannot read weights {path}: it is {other}")
    try:
        if _is_safetensors(path):
            return safetensors.torch.load_file(path)
        with torch.serialization.safe_globals(_ALLOWED):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"cannot read weights {path}: besides tensors it holds a {found[1]}, which could run code. If you "
                "trust the file, load it by torch.load(..., weights_only=False), and save its state_dict"
            ) from error
        raise ValueError(f"cannot read weights {path}: damaged, or not a file of torch.save") from error
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read weights {path}: damaged, or of an unknown format ({reason})") from error


def _is_safetensors(path: Path) -> bool:
    """Return whether a file has the extension of safetensors, or its start: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _files_in(folder: Path) -> str:
    names = sorted(file.name for file in folder.iterdir() if file.suffix in (".safetensors", ".pth", ".pt", ".bin"))
    return f"; give a file in it, such as {names[0]}" if names else ""


def _other_kind(path: Path) -> str | None:
    """Return the kind of a file without readable weights, in words, or None for any other file."""
    with open(path, "rb") as file:
        head = file.read(512)
    begins = head.lstrip().lower()
    if not head:
        return "empty"
    if begins.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: run `git lfs pull`"
    if begins.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a page of HTML or XML, probably from a failed download"
    if head.startswith(b"\x1f\x8b"):
        return "compressed by gzip: unpack it first"
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, the format of Keras"
    text = head.decode("utf-8", errors="ignore")
    if len(text.encode()) > len(head) - 4 and all(char.isprintable() or char.isspace() for char in text):
        return f"a text file that begins with {text.strip()[:40]!r}"
    if zipfile.is_zipfile(path):
        names = zipfile.ZipFile(path).namelist()
        if any(name.endswith(".npy") for name in names):
            return "an archive of NumPy, the format of JAX models: use timm.create_model(..., checkpoint_path=...)"
        if any(name.endswith("constants.pkl") for name in names):
            return "a TorchScript archive: save the state_dict of the model in it"
    return None


_AVERAGES = {"ema", "swa", "average", "averaged", "teacher", "momentum", "shadow", "target"}


class WeightSet(NamedTuple):
    """One set of weights in a file. A file can contain several, such as raw weights and their moving average.

    Attributes:
        place: keys of the dictionaries that contain the weights, and the common prefix of the names.
        prefix: common prefix of the names in the file. It is removed from the names in `weights`.
        weights: the weights by name, with the names of the model.
        notes: descriptions of changes in the weights.
    """

    place: str
    prefix: str
    weights: dict[str, Tensor]
    notes: list[str]

    @property
    def is_average(self) -> bool:
        """Whether the weights are a moving average, according to their place."""
        names = re.split(r"[._]", self.place.lower())
        return not _AVERAGES.isdisjoint(names)


def find(content: Any, model: nn.Module, needed: Collection[str]) -> tuple[list[WeightSet], WeightSet | None]:
    """Find the sets of weights that match a model.

    Names may have a prefix (`module.`, `_orig_mod.`, `model.`, `backbone.` and so on), or be in a format that timm
    converts. Position and patch embeddings are resampled, as in timm.

    Args:
        content: content of a file, see `read`.
        model: the model.
        needed: names of the weights that must be in the file.

    Returns:
        All sets that have all needed names, and the set that has most of them (None if there are no tensors).
    """
    fitting: dict[str, WeightSet] = {}
    nearest, most = None, -1
    for place, tensors in _containers(content):
        for found in _by_prefix(place, tensors, model, needed):
            hits = sum(key in found.weights for key in needed)
            if hits == len(needed):
                fitting.setdefault(found.place, found)
            if hits > most:
                nearest, most = found, hits
    return list(fitting.values()), nearest


def choose(fitting: list[WeightSet], ema: bool | None, path: Path) -> tuple[WeightSet, list[str]]:
    """Choose one of several sets of weights.

    Args:
        fitting: sets of weights that match the model, at least one.
        ema: True for a moving average, False for raw weights, None for a moving average if there is one.
        path: path of the file, for messages.

    Returns:
        The set of weights, and notes on the choice and on changes in the weights.

    Raises:
        ValueError: if there is no set of the requested kind, or more than one.
    """
    averages, raw = ([one for one in fitting if one.is_average == kind] for kind in (True, False))
    if ema is not None and not (averages if ema else raw):
        other = ", ".join(repr(one.place) for one in fitting)
        lacking, present = ("no moving average", "raw weights") if ema else ("no raw weights", "a moving average")
        raise ValueError(f"{path} holds {lacking} of the weights, only {present} ({other}): omit ema={ema}")
    chosen = raw if ema is False or not averages else averages
    if len(chosen) > 1:
        places = ", ".join(repr(one.place) for one in chosen)
        raise ValueError(f"{path} holds several sets of weights ({places}): save one of them to a separate file")
    found, notes = chosen[0], list(chosen[0].notes)
    if found.prefix:
        notes.insert(0, f"removed the prefix {found.prefix!r} from the names")
    if averages:
        kind = "the moving average" if found.is_average else "the raw weights"
        both = f", not {(raw if found.is_average else averages)[0].place!r}" if raw else ""
        other = f"; ema={not found.is_average} loads the other set" if both else ""
        notes.insert(0, f"loaded {kind} {found.place!r}{both}{other}")
    return found, notes


def _containers(content: Any, place: str = "") -> list[tuple[str, dict[str, Tensor]]]:
    """Return all dictionaries with tensors in a file, each with the keys of the dictionaries that contain it."""
    if not isinstance(content, Mapping):
        return []
    items = [(key, value) for key, value in content.items() if isinstance(key, str)]
    tensors = {key: value for key, value in items if isinstance(value, Tensor)}
    own = [(place, tensors)] if tensors else []
    return own + [one for key, value in items for one in _containers(value, f"{place}{key}.")]


def _by_prefix(place: str, tensors: dict[str, Tensor], model: nn.Module, needed: Collection[str]) -> list[WeightSet]:
    """Return the sets of weights in a dictionary, one for each prefix. If none matches, let timm convert the names."""
    found = []
    for prefix, state in _parts(tensors, needed).items():
        weights, notes = _fitted(state, model)
        found.append(WeightSet(f"{place}{prefix}".rstrip("."), prefix, weights, notes))
    if not any(all(key in one.weights for key in needed) for one in found):
        converted, notes = _fitted(tensors, model)
        for prefix, state in (_parts(converted, needed) or {"": converted}).items():
            found.append(WeightSet(f"{place}{prefix}".rstrip("."), prefix, state, notes))
    return found


def _parts(tensors: dict[str, Tensor], needed: Collection[str]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by prefix. A prefix must precede at least half of the needed names. The longest prefix counts."""
    needed = set(needed)
    hits: Counter[str] = Counter()
    for key in tensors:
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", key))]
        hits.update(key[:start] for start in starts if key[start:] in needed)
    prefixes = [prefix for prefix, count in hits.items() if 2 * count >= len(needed)]
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    for key, value in tensors.items():
        own = max((prefix for prefix in prefixes if key.startswith(prefix)), key=len, default=None)
        if own is not None:
            parts[own][key.removeprefix(own)] = value
    return parts


def _fitted(state: dict[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights with the names and sizes of the model, and notes on changes."""
    adapter = hosts.find(model)
    return (state, []) if adapter is None else adapter.convert(state)
