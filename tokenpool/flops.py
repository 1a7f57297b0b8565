"""What a model costs, in multiply-adds: fvcore's count plus fused attention, with the clustering set apart.

One multiply-add counts as one FLOP, as in fvcore and in the paper. Convolutions and matrix products count; LayerNorm,
GELU, softmax, sums, sorting and copying do not.
"""

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tokenpool import budget, schedules
from tokenpool.downsampling import REGISTRY, Convolution, Downsampler, Host, find

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
    if idle_clustering and setting is not None and _is_papers_clustering(setting.downsampler):
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


def _is_papers_clustering(downsampler: str) -> bool:
    method = REGISTRY.get(downsampler)
    return method is not None and method.in_paper and method.kind == "clustering"


def schedule_for(
    gmacs: float,
    model: VisionTransformer,
    downsampler: str | type[Downsampler] = "key_medoids",
    family: str = "decay",
    *,
    dense: bool = False,
    **options: Any,
) -> list[int]:
    """The schedule that uses up a budget, clustering included: `keep` for `tokenpool.patch`.

    What `count` finds for the model that is patched with it lies between 0.98 and 1.0 of the budget; or below, where
    one more token in any block would be too much. It is a schedule of the family, if the family has one that does so.
    See `budget.meet`.

    Args:
        gmacs: budget of one image's forward pass, in units of 10^9 multiply-adds.
        model: a timm VisionTransformer; patched or plain, it stays as it is.
        downsampler: see `tokenpool.patch`.
        family: "decay" (`schedules.by_decay`) or "step" (`schedules.by_step`).
        dense: see `tokenpool.patch`.
        **options: of the downsampler.

    Raises:
        ValueError: if even one token after the first block costs more, or all tokens less; for an unknown family,
            method or option, or for a method that has no schedule.
    """
    name, method = find(downsampler)
    if method in (None, Convolution):
        raise ValueError(f"downsampler {name!r} has no schedule that could meet a budget of {gmacs!r} GMACs")
    if not isinstance(gmacs, Real) or isinstance(gmacs, bool) or not 0 < gmacs < math.inf:
        raise ValueError(f"gmacs = {gmacs!r} must be a positive number")
    cost = ScheduleCost(model, method, dense=dense, **options)
    schedule = budget.family(family, cost.tokens, len(cost.blocks))
    macs = math.floor(float(gmacs) * 1e9 * (1 + 1e-15))  # what was a whole number before 1e9 divided it is one again
    plain = cost.backbone(schedule(0.0))
    if macs > plain:
        raise ValueError(
            f"gmacs = {float(gmacs):.10g} is more than the plain model costs, {plain / 1e9:.10g}: it needs no pooling; "
            "give a smaller budget"
        )
    return budget.meet(macs, cost, cost.backbone, schedule)


class _Block(NamedTuple):
    """Multiply-adds of a block: of each token before and after the downsampler, and of each pair in the attention."""

    entering: int
    leaving: int
    pair: int
    key_width: int


class ScheduleCost:
    """What a model costs by its schedule, as `count` finds it, without a pass through the whole model.

    fvcore counts the parts once, for a few tokens. The linear layers cost the same for each token, the attention for
    each pair. Downsamplers state what they cost (`Downsampler.macs`); those that do not are traced, as with
    `patch(carry=True)`.

    Args:
        model: a timm VisionTransformer; patched or plain, it stays as it is.
        method: class of the downsampler.
        dense: see `tokenpool.patch`.
        **options: of the downsampler.

    Attributes:
        tokens: patch tokens of an image.
        blocks: what each block costs.
    """

    def __init__(
        self, model: VisionTransformer, method: type[Downsampler], dense: bool = False, **options: Any
    ) -> None:
        self.host, self.method, self.options = Host.of(model, dense), method, options
        self.prefix = model.num_prefix_tokens
        known: dict[Any, int] = {}
        self.blocks = [_block(block, model.embed_dim, known) for block in model.blocks]
        self._traced: dict[tuple[int, int, int], tuple[int, int]] = {}

        # All but the blocks, which are not copied, and of what comes out of them only so many tokens.
        rest = copy.deepcopy(model, {id(model.blocks): nn.Sequential(_First(0))}).cpu().float().eval()
        image = torch.zeros(1, rest.in_chans, *rest.patch_embed.img_size)
        with torch.no_grad():
            self.tokens = rest.patch_embed(image).numel() // rest.embed_dim
        merges = any(layer is not None and layer.merges for layer in self._layers([1] * len(self.blocks)))
        self._head_reads = self.tokens if self.host.unpools and merges else None
        self._outside = []
        for n in [self.tokens] if self._head_reads else [1, 2, 3]:
            rest.blocks[0].limit = self.prefix + n
            self._outside.append(sum(_macs_by_part(rest, image).values()))

    def __call__(self, keep: Sequence[int]) -> int:
        """Multiply-adds of one image, clustering included."""
        macs, kept, n = 0, [], self.tokens
        for index, layer in enumerate(self._layers(keep)):
            spent, n = self._reducing(index, layer, n)
            macs, kept = macs + spent, [*kept, n]
        return macs + self._network(kept)

    def backbone(self, keep: Sequence[int]) -> int:
        """Multiply-adds of one image without clustering, where each downsampler leaves as many as it may."""
        return self._network(schedules.tokens_kept(keep, self.tokens))

    def _network(self, kept: Sequence[int]) -> int:
        macs, n = self._embedding_and_head(kept[-1]), self.tokens + self.prefix
        for block, left in zip(self.blocks, kept, strict=True):
            macs += n * block.entering + n * n * block.pair
            n = left + self.prefix
            macs += n * block.leaving
        return macs

    def _embedding_and_head(self, n: int) -> int:
        """The head is at most quadratic in the n tokens that it gets, so that three counts tell all others."""
        if self._head_reads:
            return self._outside[0]
        one, two, three = self._outside
        return one + (n - 1) * (two - one) + (n - 1) * (n - 2) // 2 * (three - 2 * two + one)

    def _layers(self, keep: Sequence[int]) -> list[Downsampler | None]:
        try:
            with torch.random.fork_rng(devices=[]):  # some have weights
                return self.method.for_blocks(self.host, list(keep), **self.options)
        except TypeError as error:
            raise ValueError(f"downsampler {find(self.method)[0]!r}: {error}") from error

    def _reducing(self, index: int, layer: Downsampler | None, n: int) -> tuple[int, int]:
        """Multiply-adds of the downsampler of a block on n tokens, and how many tokens it leaves."""
        if layer is None or not layer.acts_on(n):
            return 0, n
        width, key_width = self.host.width, self.blocks[index].key_width
        if "macs" in vars(type(layer)):
            return layer.macs(n, width, key_width) if layer.keep else 0, layer.keep
        key = (index, n, layer.keep)
        if key not in self._traced:
            # Where nothing reads where the tokens went, what only that needs is not in the graph that `count` sees.
            is_read = index < len(self.blocks) - 1 or self._head_reads is not None
            self._traced[key] = _traced(layer, n, width, key_width, is_read)
        return self._traced[key]


class _First(nn.Module):
    """The first tokens only."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens[:, : self.limit]


def _block(block: nn.Module, width: int, known: dict[Any, int]) -> _Block:
    """What a block costs; its layers are counted but once where others of the same structure are `known`."""

    def per_token(layer: nn.Module | None, inputs: int) -> int:
        if layer is None:
            return 0
        kinds = tuple((name, type(part)) for name, part in layer.named_modules())
        shapes = tuple((name, value.shape) for name, value in layer.state_dict().items() if torch.is_tensor(value))
        if (structure := (kinds, shapes)) not in known:
            copied = copy.deepcopy(layer).cpu().float().eval()
            known[structure] = sum(_macs_by_part(copied, torch.zeros(1, 1, inputs)).values())
        return known[structure]

    attention = block.attn
    inner = attention.num_heads * attention.head_dim
    entering = per_token(attention.qkv, width) + per_token(attention.proj, inner)
    entering += per_token(getattr(attention, "gate", None), width)
    return _Block(entering, per_token(block.mlp, width), 2 * inner, attention.head_dim)


def _traced(layer: Downsampler, n: int, width: int, key_width: int, with_assignment: bool = True) -> tuple[int, int]:
    """Multiply-adds of a downsampler on n tokens, and how many tokens it leaves: by running it."""
    draw = partial(torch.rand, generator=torch.Generator().manual_seed(0))  # of no meaning: no course depends on values
    hints = {"sizes": torch.ones(1, n)} if layer.uses_sizes else {}
    hints |= {"keys": draw(1, n, key_width)} if layer.uses_keys else {}
    inputs = draw(1, n, width), draw(1, n)
    bare = _Bare(copy.deepcopy(layer), hints, with_assignment)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        return sum(_macs_by_part(bare, inputs).values()), bare(*inputs)[0].shape[1]


class _Bare(nn.Module):
    """A downsampler that is called with tensors only, as tracing wants it."""

    def __init__(self, layer: Downsampler, hints: dict[str, torch.Tensor], with_assignment: bool) -> None:
        super().__init__()
        self.layer, self.hints, self.outputs = layer.eval(), hints, 2 if with_assignment else 1

    def forward(self, tokens: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(self.layer(tokens, scores, **self.hints)[: self.outputs])


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
