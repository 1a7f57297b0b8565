"""timm's vision transformers with a downsampler between the attention and the MLP of each block."""

import difflib
import inspect
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from tokenpool import micro_batch, schedules
from tokenpool.adoption import adopt, check_exchangeable, give_back, reference
from tokenpool.attention import ScoredAttention
from tokenpool.clustering import is_in_graph
from tokenpool.downsampling import Downsampler, Host, find
from tokenpool.flops import schedule_for


class Stream(NamedTuple):
    """What travels from block to block.

    Attributes:
        tokens: (B, P + N, D), P prefix tokens (class, register, distillation) and N patch tokens.
        sizes: (B, P + N), the number of original tokens that each stands for; None where nothing needs them.
        assignment: (B, patches), the patch token that each patch is in now; None where nothing needs it.
    """

    tokens: Tensor
    sizes: Tensor | None
    assignment: Tensor | None

    def split(self, images: int) -> list["Stream"]:
        """Streams of that many images each, the last of as many as are left."""
        parts = [itertools.repeat(None) if part is None else part.split(images) for part in self]
        return [Stream(*part) for part in zip(*parts, strict=False)]

    @staticmethod
    def cat(streams: Sequence["Stream"]) -> "Stream":
        """One stream of all the images."""
        if len(streams) == 1:
            return streams[0]
        return Stream(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*streams, strict=True)))


@dataclass(frozen=True)
class Setting:
    """How a model was patched: the arguments of `patch`."""

    downsampler: str
    keep: tuple[int, ...] | None
    carry: bool
    qk_norm: str | None = None
    alpha: float = 1.0
    learn_alpha: bool = False
    dense: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_NEEDS_PLAIN = (
    "gradient checkpointing, attention masks, features_only, forward_intermediates and slices of the blocks need a "
    "plain model: call tokenpool.unpatch first"
)


class PooledBlock(nn.Module):
    """timm's `Block` with a downsampler between attention and MLP (Marin et al. 2021, section 4).

    It adopts the submodules of a timm block under their own names, so that checkpoints stay the same.
    """

    def __init__(
        self, host: Block, attention: ScoredAttention, downsampler: Downsampler | None, prefix: int, carry: bool
    ) -> None:
        super().__init__()
        adopt(self, host)
        self._host = (host,)  # a tuple, so that it is no submodule
        self.attn = attention
        self.downsampler = downsampler and downsampler.train(host.training)
        self.prefix = prefix
        self.carry = carry

    def give_back(self) -> Block:
        """The timm block, with the submodules that stand here now."""
        self.attn.give_back()
        give_back(self, self._host[0], but=("attn", "downsampler"))
        return self._host[0]

    def forward(self, stream: Stream, **unsupported: Any) -> Stream:
        if not isinstance(stream, Stream) or unsupported:
            raise TypeError(f"a pooled block was called on its own; {_NEEDS_PLAIN}")
        tokens, sizes, patches = self._attend_and_downsample(stream)
        tokens = tokens + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens))))
        return Stream(tokens, sizes, patches)

    def _attend_and_downsample(self, stream: Stream) -> Stream:
        """What comes before the MLP: a method of its own, so that nothing of it takes memory during the MLP."""
        tokens, sizes, patches = stream
        downsampler, prefix = self.downsampler, self.prefix
        if downsampler is not None and not downsampler.acts_on(tokens.shape[1] - prefix):
            downsampler = None

        with_scores = downsampler is not None and downsampler.uses_scores
        with_keys = downsampler is not None and downsampler.uses_keys
        attended = self.attn(self.norm1(tokens), sizes if self.carry else None, with_scores, with_keys)
        tokens = tokens + self.drop_path1(self.ls1(attended.output))  # (B, P + N, D)
        if downsampler is None:
            return Stream(tokens, sizes, patches)
        hints = {"sizes": sizes[:, prefix:]} if downsampler.uses_sizes else {}
        hints |= {"keys": attended.keys[:, prefix:]} if with_keys else {}
        scores = attended.scores[:, prefix:] if with_scores else None
        kept, assignment = downsampler(tokens[:, prefix:], scores, **hints)
        if sizes is not None:
            sizes = torch.cat([sizes[:, :prefix], merged_sizes(sizes[:, prefix:], assignment, kept.shape[1])], dim=1)
        if patches is not None:
            patches = compose(patches, assignment)
        return Stream(torch.cat([tokens[:, :prefix], kept], dim=1), sizes, patches)  # (B, P + K, D)


class PooledBlocks(nn.Sequential):
    """The blocks of a patched model: timm calls it with tokens (B, P + N, D) and gets tokens (B, P + K, D) back.

    With `unpools` it gets all P + N back, each patch as the token that it is in (equation (9)): for heads that read
    patches. Their mean over patches, or their attention over them, then weighs each token by its size, exactly.
    """

    def __init__(
        self, blocks: Sequence[PooledBlock], setting: Setting, host: nn.Sequential, prefix: int, unpools: bool
    ) -> None:
        super().__init__(*blocks)
        self._host = (host,)  # a tuple, so that it is no submodule
        self.setting = setting
        self.prefix = prefix
        self.unpools = unpools
        self.training = host.training

    def give_back(self) -> nn.Sequential:
        """timm's blocks, those that stand here now."""
        (host,) = self._host
        blocks = [block.give_back() for block in self]
        del host[:]
        host.extend(blocks).training = self.training
        return host

    def __getitem__(self, index: int | slice) -> PooledBlock:
        if isinstance(index, slice):
            raise TypeError(f"pooled blocks cannot be sliced; {_NEEDS_PLAIN}")
        return super().__getitem__(index)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, n, _ = tokens.shape
        with_sizes = self.setting.carry or any(block.downsampler and block.downsampler.uses_sizes for block in self)
        sizes = torch.ones(batch, n, device=tokens.device) if with_sizes else None
        patches = torch.arange(n - self.prefix, device=tokens.device).expand(batch, -1) if self.unpools else None
        stream = Stream(tokens, sizes, patches)
        streams = self._parts(stream)
        for block in self:
            streams = _joined([block(part) for part in streams])
        stream = Stream.cat(streams)
        if not self.unpools:
            return stream.tokens
        back = unpool(stream.tokens[:, self.prefix :], stream.assignment)
        return torch.cat([stream.tokens[:, : self.prefix], back], dim=1)

    def _parts(self, stream: Stream) -> list[Stream]:
        """The stream, or on a CPU streams of a few images each.

        With gradients that would save nothing, in a graph it would be unrolled, hooks expect a whole batch, and random
        numbers of training are drawn for one.
        """
        whole = is_in_graph() or torch.is_grad_enabled() or self.training
        tokens = stream.tokens
        if whole or tokens.device.type != "cpu" or tokens.numel() <= micro_batch.BLOCK_FLOATS:
            return [stream]
        if any(module._forward_hooks or module._forward_pre_hooks for module in self.modules()):
            return [stream]
        return stream.split(micro_batch.even_size(len(tokens), tokens.numel(), micro_batch.BLOCK_FLOATS))


def _joined(streams: list[Stream]) -> list[Stream]:
    """Neighbours put together as long as no more than `micro_batch.BLOCK_FLOATS` travel at once."""
    joined: list[list[Stream]] = []
    for stream in streams:
        if joined and sum(part.tokens.numel() for part in [*joined[-1], stream]) <= micro_batch.BLOCK_FLOATS:
            joined[-1].append(stream)
        else:
            joined.append([stream])
    return [Stream.cat(parts) for parts in joined]


def unpool(tokens: Tensor, assignment: Tensor) -> Tensor:
    """Put K tokens back where the N patches were, by nearest-neighbour interpolation, equation (9).

    For dense heads, such as segmentation: `patch(..., dense=True)` does it at the end of the network.

    Args:
        tokens: (B, K, D).
        assignment: (B, N), the token that each patch is in, as in `BlockTrace.assignment`; patches that were dropped
            (-1) come back as zeros.

    Returns:
        (B, N, D).
    """
    index = assignment.clamp(min=0)[:, :, None].expand(-1, -1, tokens.shape[2])
    if tokens.shape[1] == 0:
        return tokens.new_zeros(*assignment.shape, tokens.shape[2])
    return tokens.gather(1, index) * (assignment >= 0)[:, :, None]


def compose(first: Tensor, second: Tensor) -> Tensor:
    """Assignment (B, N) -> (B, K2) from assignments (B, N) -> (B, K1) and (B, K1) -> (B, K2); -1 stays -1."""
    if second.shape[1] == 0:
        return torch.full_like(first, -1)
    return torch.where(first >= 0, second.gather(1, first.clamp(min=0)), -1)


def merged_sizes(sizes: Tensor, assignment: Tensor, k: int) -> Tensor:
    """Sizes (B, K) of the kept tokens from the sizes (B, N) of those assigned to them; dropped ones are not carried."""
    bins = sizes.new_zeros(sizes.shape[0], k + 1)  # the first for the dropped, whose assignment is -1
    return bins.scatter_add(1, assignment + 1, sizes)[:, 1:]


def patch(
    model: VisionTransformer,
    downsampler: str | type[Downsampler],
    keep: Sequence[int] | float | str | None = None,
    *,
    gmacs: float | None = None,
    carry: bool = True,
    qk_norm: str | None = None,
    alpha: float = 1.0,
    learn_alpha: bool = False,
    dense: bool = False,
    **options: Any,
) -> VisionTransformer:
    """Put downsamplers into a timm VisionTransformer, in place. A model that is patched already is patched anew.

    Patch again after timm's `reset_classifier` or `set_input_size`: what the head reads, and the grid, are looked up
    here. Parameter-free methods leave `state_dict()` as it is, key for key.

    Only `model.blocks`, each block and its `attn` are exchanged. All that is inside them (norms, `attn.qkv`,
    `attn.proj`, `mlp`, ...) stays, whatever has become of it: adapters such as LoRA, quantised modules,
    parametrizations, modes (training or evaluation), and hooks. `unpatch` and patching anew keep what stands there
    then. A hook, parameter or `forward` that users gave one of the exchanged modules themselves would be lost, and is
    refused. Downsamplers and learned alphas are part of the patch: they go with `unpatch`, and start anew.

    Args:
        model: any `timm.models.vision_transformer.VisionTransformer` of standard blocks.
        downsampler: a name in `tokenpool.downsampling.METHODS`, or a class of your own that keeps its contract.
        keep: retention schedule: `keep[l]` patch tokens remain, at most, after the attention of block l. Or a spelling
            of one: 0.9, the share that each block keeps; "-13", the number that each removes; "deit_small:3", the
            paper's schedule of that level, but for one token where the head reads patches (see `schedules.resolve`).
            Spellings and budgets are resolved at the size that the model is built for.
        gmacs: instead of `keep`, what one image may cost, in 10^9 multiply-adds, clustering included; 98 % or more of
            it is used (see `flops.schedule_for`).
        carry: let each token carry the number of original tokens that it stands for into the next attentions, as the
            log added to its key's logits (appendix E; *proportional attention* in Bolya et al. 2023). It makes up for
            most of the loss where a model is not fine-tuned. With methods that drop tokens it changes nothing.
        qk_norm: "l2" normalises queries and keys and uses `alpha` in place of 1 / sqrt(d) (appendix F).
        alpha: see `qk_norm`.
        learn_alpha: make alpha a parameter of each block; adds the key `blocks.*.attn.alpha`.
        dense: have `forward_features` return all N patches, each as the token that it is in (see `unpool`), for dense
            heads such as segmentation. Needs a method that merges. Models whose own head reads patches do so anyway.
        **options: arguments of the downsampler's class, such as `init="random"` for Token Pooling, `at=[3, 6]` for
            convolution, `seed` or `generator` for random selection.

    Returns:
        The same model.

    Raises:
        TypeError: if the model is no timm VisionTransformer of standard blocks. Of a model that wraps one (peft's
            `PeftModel`, `DistributedDataParallel`, what `torch.compile` returns) the message names the one inside.
        ValueError: for an unknown method or option, an unusable `keep`, or a hook that would be lost.
    """
    name, method = find(downsampler)
    _check_model(model)
    if gmacs is not None:
        if keep is not None:
            raise ValueError(f"keep = {keep!r} and gmacs = {gmacs!r} are two schedules: give one of them")
        keep = schedule_for(gmacs, model, downsampler, dense=dense, **options)
    if qk_norm not in (None, "l2"):
        raise ValueError(f'qk_norm = {qk_norm!r} must be None or "l2"')
    if qk_norm is None and (learn_alpha or alpha != 1.0):
        raise ValueError('alpha and learn_alpha need qk_norm="l2"')
    if not isinstance(alpha, Real) or not 0 < alpha < float("inf"):
        raise ValueError(f"alpha = {alpha!r} must be a positive number")

    prefix = model.num_prefix_tokens
    host = Host.of(model, dense)
    if dense and not (method and method.merges):
        raise ValueError(f"dense features need a method that merges tokens; {name!r} does not")
    if method is None:
        if keep is not None or options:
            raise ValueError('downsampler "none" takes no keep and no options')
        layers = [None] * host.depth
    else:
        if keep is not None:
            spelled = isinstance(keep, str)
            keep = schedules.resolve(keep, math.prod(host.grid), host.depth)
            if spelled and host.reads_patches:  # the paper's schedules, made for heads that do not, end with no patch
                keep = [max(limit, 1) for limit in keep]
        try:
            layers = method.for_blocks(host, keep, **options)
        except TypeError as error:
            raise ValueError(f"downsampler {name!r}: {error}") from error

    unpatch(model)
    if method is None and qk_norm is None:
        return model
    like = reference(model.blocks)
    layers = [layer and layer.to(device=like.device, dtype=like.dtype) for layer in layers]
    blocks = [
        PooledBlock(block, ScoredAttention(block.attn, qk_norm, alpha, learn_alpha), layer, prefix, carry)
        for block, layer in zip(model.blocks, layers, strict=True)
    ]
    keep = None if keep is None else tuple(keep)
    setting = Setting(name, keep, carry, qk_norm, alpha, learn_alpha, dense, options)
    unpools = host.unpools and any(layer is not None and layer.merges for layer in layers)
    model.blocks = PooledBlocks(blocks, setting, model.blocks, prefix, unpools)
    return model


def unpatch(model: VisionTransformer) -> VisionTransformer:
    """Undo `patch`, in place: the plain timm model again, with the weights and submodules that it has now.

    Returns:
        The same model. One that is not patched stays as it is.

    Raises:
        TypeError: if the model only wraps a patched one, or a block or attention has been replaced.
        ValueError: for a hook that would be lost, see `patch`.
    """
    if any(isinstance(module, PooledBlocks) for module in model.modules()):
        _check_model(model)
        model.blocks = model.blocks.give_back()
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `patch` has been applied to the model."""
    return isinstance(getattr(model, "blocks", None), PooledBlocks)


def create_model(
    name: str,
    downsampler: str | type[Downsampler] = "none",
    keep: Sequence[int] | float | str | None = None,
    *,
    gmacs: float | None = None,
    carry: bool = True,
    pretrained: bool = False,
    qk_norm: str | None = None,
    alpha: float = 1.0,
    learn_alpha: bool = False,
    dense: bool = False,
    **options: Any,
) -> VisionTransformer:
    """Create a timm VisionTransformer with downsamplers.

    Args:
        name: any VisionTransformer that timm knows, or `deit_e252_patch16_224` and `deit_e318_patch16_224`.
        downsampler: see `patch`.
        keep: see `patch`.
        gmacs: see `patch`.
        carry: see `patch`. The paper's own models have carry=False: "when the models are trained with Token Pooling
            layers, the carry operation is not important" (appendix E).
        pretrained: load timm's weights.
        qk_norm: see `patch`.
        alpha: see `patch`.
        learn_alpha: see `patch`.
        dense: see `patch`.
        **options: those that the downsampler's class knows go there (see `patch`), all others to `timm.create_model`:
            `num_classes`, `img_size`, `drop_path_rate` and so on.

    Raises:
        TypeError: for a timm model that is no VisionTransformer of standard blocks.
        ValueError: for an unknown model or method, or an unusable `keep`.
    """
    _, method = find(downsampler)
    if not isinstance(name, str):
        raise ValueError(f"name = {name!r} must be the name of a timm model")
    if not timm.is_model(name.split(".")[0]) and ":" not in name:
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; close names: {', '.join(close)}" if close else ""
        raise ValueError(f"timm knows no model {name!r}{hint}. timm.list_models('*vit*') lists the names")
    pooling = {option: options.pop(option) for option in _option_names(method) & options.keys()}
    try:
        model = timm.create_model(name, pretrained=pretrained, **options)
    except (TypeError, AssertionError) as error:
        raise ValueError(f"neither {name!r} nor downsampler {downsampler!r} takes these options: {error}") from error
    settings = {"gmacs": gmacs, "carry": carry, "qk_norm": qk_norm, "alpha": alpha, "learn_alpha": learn_alpha}
    return patch(model, downsampler, keep, dense=dense, **settings, **pooling)


def _option_names(method: type[Downsampler] | None) -> set[str]:
    if method is None:
        return set()
    names = {*inspect.signature(method.for_blocks).parameters, *inspect.signature(method.__init__).parameters}
    return names - {"self", "host", "keep", "options"}


_SUPPORTED = (
    "supported are timm's VisionTransformer models of standard blocks (ViT, DeiT, DeiT-3, DINOv2, CLIP, SigLIP, ...)"
)
# What the names of modules and parameters tell of a model, and why merged tokens do not fit in.
_OBSTACLES = (
    ("featuregetter", "features_only hands out the whole grid of patches after each block"),
    ("window|swin", "its attention runs in windows, which need the whole grid of patches"),
    ("stages|downsample|pool_block", "it is hierarchical: its stages need the whole grid of patches"),
    ("rope|rotary", "its rotary positions tie each token to one place of the grid, and a merged token has several"),
    ("rel_pos|relpos|relative_position", "its relative positions tie each token to one place of the grid"),
    ("parallel", "its attention and MLP run side by side, so that there is no place between them"),
)


def _check_model(model: nn.Module) -> None:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if inner := wrapped_name(model):
        raise TypeError(
            f"{kind} only wraps the VisionTransformer to pool: call patch and unpatch on its `{inner}`, in place"
        )
    if not isinstance(model, VisionTransformer):
        raise TypeError(f"{kind} cannot be pooled: {_obstacle(model)}; {_SUPPORTED}")
    patched = is_patched(model)
    if not patched and type(model.blocks) is not nn.Sequential:
        kind = type(model.blocks).__name__
        raise TypeError(
            f"model.blocks is a {kind}, which cannot be pooled: it is not timm's nn.Sequential; {_SUPPORTED}"
        )
    check_exchangeable(model.blocks, "model.blocks")
    for index, block in enumerate(model.blocks):
        name = f"blocks[{index}]"
        if patched:
            _check_pooled(block, name)
        elif type(block) is not Block or type(block.attn) is not Attention:
            kind = type(block).__name__ if type(block) is not Block else type(block.attn).__name__
            raise TypeError(f"block {index} is a {kind}, which cannot be pooled: {_obstacle(block)}; {_SUPPORTED}")
        check_exchangeable(block, name)
        check_exchangeable(block.attn, f"{name}.attn", own=("alpha",) if patched else ())


def _check_pooled(block: nn.Module, name: str) -> None:
    attention = getattr(block, "attn", None)
    for module, kind, where in ((block, PooledBlock, name), (attention, ScoredAttention, f"{name}.attn")):
        if type(module) is not kind:
            raise TypeError(
                f"{where} is a {type(module).__name__} in place of the {kind.__name__} that patch has put there, and "
                "would be lost: put that back first"
            )


def wrapped_name(model: nn.Module) -> str | None:
    """Where the VisionTransformer is in a model that only wraps one; None in one, and in what has none."""
    if isinstance(model, VisionTransformer) or type(model).__name__.startswith("FeatureGetter"):
        return None
    return next((path for path, module in model.named_modules() if isinstance(module, VisionTransformer)), None)


def _obstacle(model: nn.Module) -> str:
    classes = (type(module).__name__ for module in model.modules())
    names = " ".join([*classes, *(name for name, _ in model.named_modules()), *model.state_dict()]).lower()
    reasons = (reason for pattern, reason in _OBSTACLES if re.search(pattern, names))
    return next(reasons, "its blocks are not timm's Block of normalisation, timm's Attention, normalisation and MLP")
