"""What a model costs, in multiply-adds: fvcore's count plus fused attention, with the clustering set apart.

One multiply-add counts as one FLOP, as in fvcore and in the paper. Convolutions and matrix products count; LayerNorm,
GELU, softmax, sums, sorting and copying do not.
"""

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenpool import schedules
from tokenpool.downsampling import Convolution, Downsampler, find
from tokenpool.vit import unpatch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore scripts a loss on import, which newer PyTorch warns of
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import (
        addmm_flop_jit,
        bmm_flop_jit,
        conv_flop_jit,
        einsum_flop_jit,
        get_shape,
        linear_flop_jit,
        matmul_flop_jit,
    )

PAPERS_CLUSTERINGS = ("kmeans", "kmedoids", "wkmeans", "wkmedoids")
PARTS = ("softmax_attention", "qkv_projections", "o_projection", "mlp", "patch_embedding", "head", "clustering")


def fused_attention_flop_jit(inputs: list[Any], outputs: list[Any]) -> int:
    """Multiply-adds of `aten::scaled_dot_product_attention`: Q K^T and A V, which fvcore does not know."""
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    pairs = query[-2] * key[-2]
    for size in query[:-2]:
        pairs *= size
    return pairs * (query[-1] + value[-1])


COUNTED = {
    "aten::_convolution": conv_flop_jit,
    "aten::addmm": addmm_flop_jit,
    "aten::bmm": bmm_flop_jit,
    "aten::einsum": einsum_flop_jit,
    "aten::linear": linear_flop_jit,
    "aten::matmul": matmul_flop_jit,
    "aten::mm": matmul_flop_jit,
    "aten::scaled_dot_product_attention": fused_attention_flop_jit,
}

# Known, and free by the paper's convention: elementwise, reducing, sorting, indexing and reshaping operators.
FREE = {
    f"aten::{name}"
    for name in """
    abs adaptive_avg_pool2d add add_ all amax amin aminmax __and__ any arange argmax argmin argsort avg_pool2d
    batch_norm bernoulli_ bitwise_and bitwise_not bitwise_or broadcast_tensors cat ceil chunk clamp clamp_ clamp_min
    clamp_min_ clone constant_pad_nd contiguous copy_ cumsum detach diagonal div div_ dropout empty empty_like eq
    exp exp2 expand expand_as eye fill_ flatten floor floor_divide full full_like gather ge gelu group_norm gt index
    index_add index_copy index_put index_put_ index_select instance_norm layer_norm le lift_fresh linalg_vector_norm
    linspace log log2 logical_and logical_not lt masked_fill masked_fill_ max max_pool2d maximum mean min minimum
    movedim mT mul mul_ narrow ne neg new_empty new_full new_ones new_zeros norm normal_ ones ones_like __or__ pad
    permute pow prod rand rand_like randn reciprocal relu repeat repeat_interleave reshape reshape_as rms_norm round
    rsqrt rsub scatter scatter_add scatter_reduce select sigmoid silu slice softmax sort split split_with_sizes sqrt
    square squeeze stack std sub sub_ sum t tanh to topk transpose tril triu type_as unbind unflatten unsqueeze
    upsample_bicubic2d _upsample_bicubic2d_aa var view view_as where zero_ zeros zeros_like
    """.split()
}


@dataclass(frozen=True)
class Count:
    """Multiply-adds of one image's forward pass, in units of 10^9.

    Attributes:
        parts: what each part costs; the keys are `PARTS`, "convolution" for that downsampler, and "other" for the
            rest of an unusual model.
    """

    parts: dict[str, float]

    @property
    def gmacs(self) -> float:
        """All of it."""
        return sum(self.parts.values())

    @property
    def clustering_gmacs(self) -> float:
        """What clustering adds."""
        return self.parts["clustering"]

    @property
    def backbone_gmacs(self) -> float:
        """All but clustering."""
        return self.gmacs - self.clustering_gmacs


def count(model: nn.Module, image_size: tuple[int, int] | None = None, idle_clustering: bool = False) -> Count:
    """Count the multiply-adds of one image's forward pass through a (patched) timm VisionTransformer.

    Clustering that runs is counted: N^2 D for K-Medoids' distance matrix, at most `iterations` times K N D for
    K-Means, at those blocks where tokens are clustered. As in the paper: neither early stopping is counted on, nor how
    K-Medoids gets at its distances on a CPU where few tokens go: those of few tokens, but anew in each iteration, and
    apart from those by which `key_medoids` finds its first medoids. Mostly that is fewer. (On a GPU sums over
    clusters are matrix products too, for the sake of repeatability; they are not counted.)

    Args:
        model: a timm VisionTransformer, patched or plain, or a model that wraps one; it is copied, and stays as it is.
            Adapters inside its layers count as part of these.
        image_size: height and width in pixels. Default: the size that the model is built for.
        idle_clustering: count clustering as the paper's tables do instead: K-Medoids' distance matrix at all blocks,
            also where nothing is clustered. `paper_clustering_macs` states the rule.

    Raises:
        ValueError: if the model runs an operator that is neither counted nor known to be free, which the message names,
            or cannot be traced, such as a quantised one.
    """
    copied = copy.deepcopy(model).cpu().float().eval()
    height, width = image_size or copied.patch_embed.img_size
    macs = _macs_by_part(copied, torch.zeros(1, copied.in_chans, height, width))
    setting = getattr(copied.blocks, "setting", None)
    if idle_clustering and setting is not None and setting.downsampler in PAPERS_CLUSTERINGS:
        tokens = (height // copied.patch_embed.patch_size[0]) * (width // copied.patch_embed.patch_size[1])
        macs["clustering"] = paper_clustering_macs(setting.downsampler, setting.keep, tokens, copied.embed_dim)
    return Count({part: total / 1e9 for part, total in macs.items()})


def paper_clustering_macs(downsampler: str, keep: Sequence[int], tokens: int, width: int) -> int:
    """Multiply-adds of clustering, by the rule that reproduces the paper's Tables 2-5.

    K-Medoids: N^2 D at every block, with N the tokens that enter its downsampler, whether or not anything is clustered.
    K-Means: 5 K N D at the blocks that do cluster. Other methods: nothing.

    Args:
        downsampler: name of the method.
        keep: retention schedule.
        tokens: patch tokens of the image.
        width: D.
    """
    kept = schedules.tokens_kept(keep, tokens)
    entering = [tokens, *kept[:-1]]
    if downsampler in ("kmedoids", "wkmedoids"):
        return sum(n * n * width for n in entering)
    if downsampler in ("kmeans", "wkmeans"):
        return sum(5 * k * n * width for n, k in zip(entering, kept, strict=True) if k < n)
    return 0


def schedule_for(
    gmacs: float,
    model: VisionTransformer,
    downsampler: str | type[Downsampler] = "key_medoids",
    family: str = "decay",
    **options: Any,
) -> list[int]:
    """The schedule of a family that costs as much as it may, clustering included: `keep` for `tokenpool.patch`.

    Args:
        gmacs: budget of one image's forward pass, in units of 10^9 multiply-adds.
        model: a timm VisionTransformer; patched or plain, it stays as it is.
        downsampler: see `tokenpool.patch`.
        family: "decay" (`schedules.by_decay`) or "step" (`schedules.by_step`).
        **options: of the downsampler.

    Raises:
        ValueError: if even one token after the first block costs more, for an unknown family, method or option, or for
            a method that has no schedule.
    """
    name, method = find(downsampler)
    if method in (None, Convolution):
        raise ValueError(f"downsampler {name!r} has no schedule that could meet a budget of {gmacs!r} GMACs")
    try:
        method(1, **options)
    except TypeError as error:
        raise ValueError(f"downsampler {name!r}: {error}") from error
    if not isinstance(gmacs, Real) or not gmacs > 0:
        raise ValueError(f"gmacs = {gmacs!r} must be a positive number")
    plain = unpatch(copy.deepcopy(model))
    tokens, depth, prefix = plain.patch_embed.num_patches, len(plain.blocks), plain.num_prefix_tokens
    schedule = _schedules(family, tokens, depth)
    parts = count(plain).parts

    def backbone(keep: Sequence[int]) -> float:
        """Every part of a block is linear in the tokens but for attention, which is quadratic."""
        cost, n = parts["patch_embedding"] + parts["head"] + parts.get("other", 0.0), tokens
        for k in keep:
            entering, leaving = (n + prefix) / (tokens + prefix), (k + prefix) / (tokens + prefix)
            block = entering**2 * parts["softmax_attention"] + leaving * parts["mlp"]
            cost += (block + entering * (parts["qkv_projections"] + parts["o_projection"])) / depth
            n = k
        return cost

    def clustering(keep: Sequence[int]) -> float:
        layers = zip([tokens, *keep], [method(k, **options) for k in keep], strict=False)
        return sum(_downsampler_macs(layer, n, plain) for n, layer in layers if layer.acts_on(n)) / 1e9

    def within(budget: float) -> list[int]:
        """The dearest schedule whose backbone costs no more, or the cheapest one."""
        if backbone(schedule(0.0)) <= budget:
            return schedule(0.0)
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if backbone(schedule(middle)) > budget else (low, middle)
        return schedule(high)

    best, reserved = schedule(1.0), 0.0
    least = backbone(best) + clustering(best)
    if least > gmacs:
        raise ValueError(f"{gmacs} GMACs are too few: with one token left after the first block, it costs {least:.3g}")
    # Counting clusterings is slow, so look for what they cost, not for the schedule: what it is where all is spent on
    # the backbone is too much, and what that leaves room for is too little.
    for attempt in range(6):
        keep = within(gmacs - reserved)
        spent = clustering(keep)
        if backbone(best) < backbone(keep) <= gmacs - spent:
            best = keep
        if spent == reserved:
            break
        reserved = (reserved + spent) / 2 if attempt else spent
    return best


def _schedules(family: str, tokens: int, depth: int) -> Callable[[float], list[int]]:
    """The schedules of a family by their steepness, from 0, all tokens, to 1, one token after the first block."""
    if family == "decay":
        return lambda steepness: schedules.by_decay(steepness * depth**2 * math.log(2 * tokens), tokens, depth)
    if family == "step":
        return lambda steepness: schedules.by_step(steepness * tokens, tokens, depth)
    raise ValueError(f'family = {family!r} must be "decay" or "step"')


def _downsampler_macs(layer: Downsampler, n: int, model: VisionTransformer) -> int:
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(0))  # of no meaning: no course depends on values
    hints = {"sizes": torch.ones(1, n)} if layer.uses_sizes else {}
    hints |= {"keys": draw(1, n, model.blocks[0].attn.head_dim)} if layer.uses_keys else {}
    inputs = draw(1, n, model.embed_dim), draw(1, n)
    return sum(_macs_by_part(_Bare(layer, hints), inputs).values())


class _Bare(nn.Module):
    """A downsampler that is called with tensors only, as tracing wants it."""

    def __init__(self, layer: Downsampler, hints: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.hints = layer.eval(), hints

    def forward(self, tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.layer(tokens, scores, **self.hints).tokens


class FlopsCallback(Callback):
    """Counts the model at the start of a fit and logs `gmacs`, `backbone_gmacs`, `clustering_gmacs` and the parts.

    The module must hold the network as `model`. The count is at hand as `callback.count` afterwards.
    """

    count: Count | None = None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.count = count(module.model)
        figures = {
            "gmacs": self.count.gmacs,
            "backbone_gmacs": self.count.backbone_gmacs,
            "clustering_gmacs": self.count.clustering_gmacs,
        } | {f"gmacs/{part}": value for part, value in self.count.parts.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=0)


def _macs_by_part(model: nn.Module, images: torch.Tensor | tuple[torch.Tensor, ...]) -> Counter[str]:
    analysis = FlopCountAnalysis(model, images)
    analysis.clear_op_handles()
    analysis.set_op_handle(**COUNTED, **dict.fromkeys(FREE))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # that shapes are fixed by tracing is what is wanted here
        try:
            by_module = analysis.by_module()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"cannot count this model, since PyTorch cannot trace it ({reason}). Where it is quantised, count it, "
                "or find its schedule, before that"
            ) from error
    unknown = analysis.unsupported_ops()
    if unknown:
        raise ValueError(
            f"cannot count {', '.join(sorted(unknown))}: neither a counted nor a known free operator. "
            "Add it to tokenpool.flops.COUNTED or tokenpool.flops.FREE"
        )

    macs = Counter(dict.fromkeys(PARTS, 0))
    inner = (f"{name}." for name, module in model.named_modules() if name and isinstance(module, VisionTransformer))
    prefix = next(inner, "")  # of a model that wraps the transformer, such as peft's
    for name, module in model.named_modules():
        own = by_module[name] - sum(by_module[f"{name}.{child}".lstrip(".")] for child, _ in module.named_children())
        if own:
            macs[_part(name.removeprefix(prefix))] += own
    return macs


def _part(name: str) -> str:
    """The part that a module belongs to, by its name in a timm VisionTransformer."""
    for pattern, part in (
        (r"patch_embed", "patch_embedding"),
        (r"blocks\.\d+\.attn\.(qkv|gate)", "qkv_projections"),
        (r"blocks\.\d+\.attn\.proj", "o_projection"),
        (r"blocks\.\d+\.attn$", "softmax_attention"),
        (r"blocks\.\d+\.mlp", "mlp"),
        (r"blocks\.\d+\.downsampler\.convolution", "convolution"),
        (r"blocks\.\d+\.downsampler", "clustering"),
        (r"head|attn_pool|fc_norm", "head"),
    ):
        if re.match(pattern, name):
            return part
    return "other"
