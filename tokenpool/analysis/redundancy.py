"""Section 3.3 as an experiment: attention is a low-pass filter, so tokens are redundant after it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from tokenpool.vit import is_patched


class Signals(NamedTuple):
    """What goes into one block's attention and what comes out of it; patch tokens only.

    Attributes:
        queries: (B, H, N, d).
        keys: (B, H, N, d).
        values: (B, N, D), the signal that attention filters, all heads side by side.
        filtered: (B, N, D), the same after filtering (all tokens attend, also the class token).
        before: (B, N, D), the block's tokens before attention.
        after: (B, N, D), the same with attention's output added: what a downsampler gets.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    filtered: Tensor
    before: Tensor
    after: Tensor


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Equation (6): (..., N, d), (..., N, d), (..., N, D) -> (..., N, D)."""
    return (alpha * queries @ keys.mT).softmax(-1) @ values


def gaussian_filter(queries: Tensor, keys: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Equation (7): the values at the keys, filtered by a Gaussian of variance 1 / alpha, sampled at the queries.

    Shapes as for `softmax_attention`. The two are equal where queries and keys all have the same length.
    """
    distance = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")  # (..., N, N)
    kernel = (-alpha / 2 * distance.square()).exp()
    return kernel @ values / kernel.sum(-1, keepdim=True)


def leading_energy(tokens: Tensor, share: float = 0.1) -> Tensor:
    """Share of the tokens' variance that their leading singular vectors hold: (B, N, D) -> (B,), in 0..1.

    The tokens are centred first. The higher, the more redundant.

    Args:
        tokens: (B, N, D).
        share: of the min(N, D) singular vectors that lead; rounded up.
    """
    tokens = tokens.double() - tokens.double().mean(1, keepdim=True)
    gram = tokens @ tokens.mT if tokens.shape[1] < tokens.shape[2] else tokens.mT @ tokens
    energy = torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)  # (B, min(N, D)), descending
    leading = -(-energy.shape[-1] * share // 1)
    return energy[:, : int(leading)].sum(-1) / energy.sum(-1)


def neighbour_distance(tokens: Tensor) -> Tensor:
    """Distance of a token to its nearest neighbour, as a share of that to any other: (B, N, D) -> (B,), in 0..1.

    Means over tokens. The lower, the more redundant.
    """
    distance = torch.cdist(tokens.float(), tokens.float())  # (B, N, N)
    n = tokens.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=tokens.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(-1).mean(-1)
    return nearest / (distance.sum((-1, -2)) / (n * (n - 1)))


def mean_energy(tokens: Tensor) -> Tensor:
    """Share of the tokens' energy that their mean holds, the lowest of frequencies: (B, N, D) -> (B,), in 0..1."""
    return tokens.float().mean(1).square().sum(-1) / tokens.float().square().sum(-1).mean(1)


@torch.no_grad()
def signals(model: VisionTransformer, images: Tensor) -> list[Signals]:
    """Run a plain model on images (B, C, H, W), and return each block's signals.

    Raises:
        ValueError: if the model is patched: its tokens become fewer on the way.
    """
    if is_patched(model):
        raise ValueError("redundancy is measured in a plain model; call tokenpool.unpatch first")
    seen: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    prefix = model.num_prefix_tokens

    def keep_input(into: dict[str, Tensor], name: str) -> Callable[..., None]:
        return lambda module, inputs: into.update({name: inputs[0][:, prefix:]})

    def keep_heads(into: dict[str, Tensor], heads: int) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            batch, n, _ = output.shape
            q, k, v = output.reshape(batch, n, 3, heads, -1)[:, prefix:].permute(2, 0, 3, 1, 4)  # (B, H, N, d)
            into.update(queries=q, keys=k, values=v.transpose(1, 2).flatten(2))

        return hook

    handles = []
    for block, into in zip(model.blocks, seen, strict=True):
        handles += [
            block.register_forward_pre_hook(keep_input(into, "before")),
            block.attn.qkv.register_forward_hook(keep_heads(into, block.attn.num_heads)),
            block.attn.proj.register_forward_pre_hook(keep_input(into, "filtered")),
            block.norm2.register_forward_pre_hook(keep_input(into, "after")),
        ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [Signals(**found) for found in seen]
