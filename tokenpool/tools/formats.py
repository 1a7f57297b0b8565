"""The formats of `tokenpool export`: ONNX, PyTorch's exported programs, and OpenVINO.

A format writes a model into a file, together with texts that describe it, and reads the file as a function of images.
"""

import json
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenpool.extras import require
from tokenpool.operators import kept_in_exports
from tokenpool.tools import onnx_clustering

OPSET = 20  # of ONNX
KEY = "tokenpool"  # of the description in a file
_STORED = "setting.json"  # name of the description in a .pt2 file
_BATCH = ({0: torch.export.Dim("batch")},)


class Format(ABC):
    """A file format.

    Attributes:
        suffix: of the file.
        packages: names to import, and `extra`, which installs them.
    """

    suffix: str
    packages: tuple[str, ...] = ()
    extra = "onnx"

    def check(self, user: str) -> None:
        """Check that the packages are installed.

        Raises:
            ModuleNotFoundError: if not. The message names the user, such as a command, and the extra.
        """
        require(user, self.extra, *self.packages)

    @abstractmethod
    def write(self, model: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], opset: int) -> None:
        """Write a model.

        Args:
            model: in evaluation mode.
            images: (B, C, H, W), B > 1, an example. The file takes any number of images.
            path: file to write.
            about: the description, JSON values.
            opset: of ONNX.
        """

    @abstractmethod
    def read(self, path: Path, threads: int = 0) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], dict[str, int]]:
        """Read a file.

        Args:
            path: the file.
            threads: of the CPU; 0: as the runtime chooses. A .pt2 file has always PyTorch's number.

        Returns:
            The function from images to logits, the description, and the number of each operator.
        """

    def parts(self, path: Path) -> list[Path]:
        """Return all files of an exported model."""
        return [path]


class Onnx(Format):
    """ONNX, run by ONNX Runtime."""

    suffix = ".onnx"
    packages = ("onnx", "onnxscript", "onnxruntime")

    def write(self, model: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], opset: int) -> None:
        with warnings.catch_warnings(), torch.no_grad(), kept_in_exports():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (images,),
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=_BATCH,
                opset_version=opset,
                custom_translation_table=onnx_clustering.translations(),
                dynamo=True,
                verbose=False,
                optimize=False,
            )
            assert program is not None
            onnx_clustering.add_functions(program.model)
            program.optimize()
        program.model.metadata_props[KEY] = json.dumps(about)
        program.save(path)

    def read(self, path: Path, threads: int = 0) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], dict[str, int]]:
        import onnx
        import onnxruntime

        stored = onnx.load(path)
        about = {entry.key: entry.value for entry in stored.metadata_props}[KEY]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Between two calls, threads would wait actively and take cores from other sessions.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])

        return run, json.loads(about), _counted(_onnx_names(stored.graph))


class Program(Format):
    """PyTorch's exported program, a .pt2 file. `torch.export.load` reads it without this package."""

    suffix = ".pt2"

    def write(self, model: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], opset: int) -> None:
        with torch.no_grad():
            program = torch.export.export(model, (images,), dynamic_shapes=_BATCH)
        torch.export.save(program, path, extra_files={_STORED: json.dumps(about)})

    def read(self, path: Path, threads: int = 0) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], dict[str, int]]:
        stored: dict[str, Any] = {_STORED: ""}
        program = torch.export.load(path, extra_files=stored)
        names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        return program.module(), json.loads(stored[_STORED]), _counted(names)


class OpenVino(Format):
    """OpenVINO's intermediate representation, made from ONNX: an .xml file, and a .bin file with the weights."""

    suffix = ".xml"
    packages = ("openvino", *Onnx.packages)
    extra = "openvino"

    def write(self, model: nn.Module, images: Tensor, path: Path, about: Mapping[str, Any], opset: int) -> None:
        import openvino

        with tempfile.TemporaryDirectory() as folder:
            onnx = Path(folder) / "model.onnx"
            Onnx().write(model, images, onnx, about, opset)
            converted = openvino.convert_model(onnx)
        converted.set_rt_info(json.dumps(about), [KEY])
        openvino.save_model(converted, path, compress_to_fp16=False)

    def read(self, path: Path, threads: int = 0) -> tuple[Callable[[Tensor], Tensor], dict[str, Any], dict[str, int]]:
        import openvino

        stored = openvino.Core().read_model(path)
        about = stored.get_rt_info([KEY]).astype(str)
        # Without the hint of the precision, some CPUs would compute in bfloat16.
        hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        compiled = openvino.compile_model(stored, "CPU", hints)

        def run(images: Tensor) -> Tensor:
            return torch.from_numpy(compiled(images.numpy())[0])

        return run, json.loads(about), _counted(node.get_type_name() for node in stored.get_ops())

    def parts(self, path: Path) -> list[Path]:
        return [path, path.with_suffix(".bin")]


FORMATS: dict[str, Format] = {"onnx": Onnx(), "pt2": Program(), "openvino": OpenVino()}


def _counted(names: Iterable[str]) -> dict[str, int]:
    return dict(Counter(names).most_common())


def _onnx_names(graph: Any) -> Iterator[str]:
    """The operators of an ONNX graph and its loops, with their reductions: TensorRT computes some of these wrongly."""
    for node in graph.node:
        reductions = [each.s.decode() for each in node.attribute if each.name == "reduction" and each.s != b"none"]
        yield "-".join([node.op_type, *reductions])
        for each in node.attribute:
            if each.HasField("g"):
                yield from _onnx_names(each.g)
