"""Count the multiply-adds of a model with fvcore, including fused attention, with clustering as a separate part.

One multiply-add counts as one FLOP, as in fvcore and in the paper. Convolutions and matrix products are counted.
LayerNorm, GELU, softmax, sums, sorting and copying are not counted.
"""

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenpool import hosts, schedules
from tokenpool.blocks import Setting
from tokenpool.downsampling import REGISTRY
from tokenpool.moved import old_names
from tokenpool.positions import MergedPositions

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore scripts a loss function on import, which is deprecated in PyTorch
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import (
        addmm_flop_jit,
        bmm_flop_jit,
        conv_flop_count,
        conv_flop_jit,
        einsum_flop_jit,
        get_shape,
        linear_flop_jit,
        matmul_flop_jit,
    )

__getattr__ = old_names(__name__)  # PEP 562

PARTS = ("softmax_attention", "qkv_projections", "o_projection", "mlp", "patch_embedding", "head", "clustering")


def fused_attention_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of `aten::scaled_dot_product_attention`, Q K^T and A V. fvcore does not know it."""
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    pairs = query[-2] * key[-2]
    for size in query[:-2]:
        pairs *= size
    return pairs * (query[-1] + value[-1])


def padded_convolution_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:
    """Count the multiply-adds of a convolution with padding "valid" or "same". fvcore does not know it."""
    return conv_flop_count(get_shape(inputs[0]), get_shape(inputs[1]), get_shape(outputs[0]))


COUNTED = {
    "aten::_convolution": conv_flop_jit,
    "aten::_convolution_mode": padded_convolution_flop_jit,
    "aten::addmm": addmm_flop_jit,
    "aten::bmm": bmm_flop_jit,
    "aten::einsum": einsum_flop_jit,
    "aten::linear": linear_flop_jit,
    "aten::matmul": matmul_flop_jit,
    "aten::mm": matmul_flop_jit,
    "aten::scaled_dot_product_attention": fused_attention_flop_jit,
}

# Operators that are not counted, as in the paper: elementwise, reducing, sorting, indexing and reshaping operators.
FREE = {
    f"aten::{name}"
    for name in """
    abs abs_ adaptive_avg_pool2d add add_ all amax amin aminmax __and__ any arange argmax argmin argsort avg_pool2d
    batch_norm bernoulli_ bitwise_and bitwise_not bitwise_or broadcast_tensors cat ceil chunk clamp clamp_ clamp_min
    clamp_min_ clone constant_pad_nd contiguous copy_ cos cumsum detach diagonal div div_ dropout embedding empty
    empty_like eq exp exp2 expand expand_as eye fill_ flatten floor floor_divide full full_like gather ge gelu
    group_norm gt index index_add index_copy index_put index_put_ index_select instance_norm layer_norm le lift_fresh
    linalg_vector_norm linspace log log2 log_softmax logical_and logical_not lt masked_fill masked_fill_ max max_pool2d
    maximum mean meshgrid min minimum movedim mT mul mul_ narrow ne neg new_empty new_full new_ones new_zeros norm
    normal_ ones ones_like __or__ pad permute pow prod rand rand_like randn reciprocal relu repeat repeat_interleave
    reshape reshape_as rms_norm round rsqrt rsub scatter scatter_ scatter_add scatter_reduce select sigmoid silu sin
    slice softmax sort split split_with_sizes sqrt square squeeze stack std sub sub_ sum t tanh tile to topk transpose
    tril triu type_as unbind unflatten unsqueeze upsample_bicubic2d _upsample_bicubic2d_aa upsample_bilinear2d
    _upsample_bilinear2d_aa upsample_linear1d var view view_as where zero_ zeros zeros_like
    """.split()
}


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one image's forward pass, in units of 10^9.

    Attributes:
        parts: cost of each part of the model. The keys are `PARTS`, "convolution" for convolutions that downsample,
            and "other" for other modules.
    """

    parts: dict[str, float]

    @property
    def gmacs(self) -> float:
        """Cost of the whole model."""
        return sum(self.parts.values())

    @property
    def clustering_gmacs(self) -> float:
        """Cost of clustering."""
        return self.parts["clustering"]

    @property
    def backbone_gmacs(self) -> float:
        """Cost of the whole model without clustering."""
        return self.gmacs - self.clustering_gmacs


def count(model: nn.Module, image_size: tuple[int, int] | None = None, idle_clustering: bool = False) -> Count:
    """Count the multiply-adds of one image's forward pass through a model, patched or plain.

    The cost of clustering is counted at blocks that cluster: N^2 D for the distance matrix of K-Medoids, and
    `iterations` times K N D for K-Means. This is the cost of the paper's algorithm. The implementation may cost less,
    because iterations can stop early, and because K-Medoids on a CPU computes fewer distances if few tokens are
    removed. On a GPU, sums over clusters are matrix products, so that they are repeatable. They are not counted.

    Args:
        model: a model of a family in `tokenpool.hosts`, patched or plain, or a model that wraps such a model. The model
            is copied and not changed. Adapters (such as LoRA) count as a part of the layers that contain them. Of a
            model for images and texts, such as CLIP, only the part for images counts, projection included. Other plain
            timm models with the same module names as VisionTransformer can be counted, too.
        image_size: height and width in pixels. Default: the model's own image size.
        idle_clustering: count clustering as in the paper's tables: the distance matrix of K-Medoids at all blocks,
            also at blocks that do not cluster. See `paper_clustering_macs`.

    Returns:
        The count, in units of 10^9 multiply-adds.

    Raises:
        ValueError: if the model runs an operator that is neither in `COUNTED` nor in `FREE`; the message names the
            operator. Also if PyTorch cannot trace the model, for example a quantised model.
    """
    copied = copy.deepcopy(model).cpu().float().eval()
    name, adapter = hosts.inside(copied) or ("", hosts.TimmViT(copied))
    if adapter.COUNT_POOLED and not adapter.is_patched:
        adapter.check()
        adapter.pool([None] * adapter.depth, Setting("none", None, carry=False))
    prefix = f"model.{name}.".replace("..", ".")
    macs = Counter(dict.fromkeys(PARTS, 0))
    for (module, operator), own in macs_by_operator(OnImages(copied, adapter), adapter.blank_image(image_size)).items():
        within = f"{module}.".removeprefix(prefix).rstrip(".")
        macs[_part(f"{within}:{operator}", adapter.PARTS)] += own
    setting = adapter.setting
    if idle_clustering and setting and setting.keep and _is_papers_clustering(setting.downsampler):
        tokens = math.prod(adapter.grid(image_size or adapter.image_shape[1:]))
        schedule = adapter.host(setting.dense).schedule(setting.form)
        keep = setting.keep if schedule is None else schedule(tokens)
        macs["clustering"] = paper_clustering_macs(setting.downsampler, keep, tokens, adapter.width)
    return Count({part: total / 1e9 for part, total in macs.items()})


class OnImages(nn.Module):
    """A model as a module whose only argument is images, and whose only result is a tensor. Tracing requires this.

    Args:
        model: a model that belongs to a family, or wraps such a model.
        adapter: the adapter of the model that belongs to the family.
    """

    def __init__(self, model: nn.Module, adapter: hosts.Adapter) -> None:
        super().__init__()
        self.model, self.adapter = model, adapter

    def forward(self, images: Tensor) -> Tensor:
        return self.adapter.run(images, self.model)


def paper_clustering_macs(downsampler: str, keep: Sequence[int], tokens: int, width: int) -> int:
    """Compute the multiply-adds of clustering by the rule that reproduces the paper's Tables 2-5.

    K-Medoids: N^2 D at every block, where N tokens enter the downsampler, also at blocks that do not cluster.
    K-Means: 5 K N D at blocks that cluster. Other methods: zero.

    Args:
        downsampler: name of the method.
        keep: retention schedule.
        tokens: number of patch tokens of an image.
        width: width D of the tokens.

    Returns:
        The multiply-adds of one image.
    """
    kept = schedules.tokens_kept(keep, tokens)
    entering = [tokens, *kept[:-1]]
    if downsampler in ("kmedoids", "wkmedoids"):
        return sum(n * n * width for n in entering)
    if downsampler in ("kmeans", "wkmeans"):
        return sum(5 * k * n * width for n, k in zip(entering, kept, strict=True) if k < n)
    return 0


def _is_papers_clustering(downsampler: str) -> bool:
    method = REGISTRY.get(downsampler)
    return method is not None and method.in_paper and method.kind == "clustering"


def macs_by_operator(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> dict[tuple[str, str], int]:
    """Count the multiply-adds of each operator in each module without its children.

    Rotary positions of merged tokens are counted by `MergedPositions.macs`, as the operator "mean".

    Args:
        model: any module on the CPU. It runs once.
        inputs: the arguments of the module.

    Returns:
        Multiply-adds, more than zero, by name of the module and operator, in the order of `model.named_modules()`.

    Raises:
        ValueError: see `count`.
    """
    analysis = FlopCountAnalysis(model, inputs)
    analysis.clear_op_handles()
    analysis.set_op_handle(**COUNTED, **dict.fromkeys(FREE))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    own: Counter[tuple[str, str]] = Counter()
    handles = [
        module.register_forward_pre_hook(
            lambda module, given, name=name: own.update({(name, "mean"): module.macs(*given)})
        )
        for name, module in model.named_modules()
        if isinstance(module, MergedPositions)
    ]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # tracing warns that it fixes shapes, which is intended here
        try:
            by_module = analysis.by_module_and_operator()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"cannot count this model, because PyTorch cannot trace it ({reason}). Count a model, or search its "
                "schedule, before it is quantised"
            ) from error
        finally:
            for handle in handles:
                handle.remove()
    unknown = analysis.unsupported_ops()
    if unknown:
        raise ValueError(
            f"cannot count {', '.join(sorted(unknown))}: add it to tokenpool.flops.COUNTED, or to tokenpool.flops.FREE "
            "if it costs no multiply-adds"
        )
    for name, module in model.named_modules():
        children: Counter[str] = Counter()
        for child, _ in module.named_children():
            children.update(by_module[f"{name}.{child}".lstrip(".")])
        for operator, macs in by_module[name].items():
            own[name, operator] += macs - children[operator]
    return {key: macs for key, macs in own.items() if macs}


def macs_by_module(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> dict[str, int]:
    """Count the multiply-adds of each module without its children. See `macs_by_operator`."""
    own: Counter[str] = Counter()
    for (name, _), macs in macs_by_operator(model, inputs).items():
        own[name] += macs
    return dict(own)


def _part(name: str, patterns: Sequence[tuple[str, str]]) -> str:
    """Return the part of the model to which an operator belongs, by the name "module:operator"."""
    return next((part for pattern, part in patterns if re.match(pattern, name)), "other")
