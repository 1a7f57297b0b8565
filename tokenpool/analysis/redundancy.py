"""Measure how redundant tokens are: attention is a low-pass filter (Marin et al. 2021, section 3.3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool import hosts


class Signals(NamedTuple):
    """Input and output of one block's attention; patch tokens only.

    Attributes:
        queries: (B, H, N, d).
        keys: (B, H, N, d).
        values: (B, N, D), the signal that attention filters, heads concatenated.
        filtered: (B, N, D), the filtered signal; all tokens take part in the attention, also the class token.
        before: (B, N, D), the block's tokens before attention.
        after: (B, N, D), these tokens plus the output of attention: the input of a downsampler.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    filtered: Tensor
    before: Tensor
    after: Tensor


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Compute equation (6): (..., N, d), (..., N, d), (..., N, D) -> (..., N, D)."""
    return (alpha * queries @ keys.mT).softmax(-1) @ values


def gaussian_filter(queries: Tensor, keys: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Compute equation (7): the values at the keys, filtered by a Gaussian of variance 1 / alpha, at the queries.

    The shapes are those of `softmax_attention`. Both functions are equal if all queries and keys have the same length.
    """
    distance = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")  # (..., N, N)
    kernel = (-alpha / 2 * distance.square()).exp()
    return kernel @ values / kernel.sum(-1, keepdim=True)


def leading_energy(tokens: Tensor, share: float = 0.1) -> Tensor:
    """Compute the share of the tokens' variance in their leading singular vectors: (B, N, D) -> (B,), in 0..1.

    The tokens are centred first. A higher share means more redundant tokens.

    Args:
        tokens: (B, N, D).
        share: which share of the min(N, D) singular vectors counts as leading; the number is rounded up.
    """
    tokens = tokens.double() - tokens.double().mean(1, keepdim=True)
    gram = tokens @ tokens.mT if tokens.shape[1] < tokens.shape[2] else tokens.mT @ tokens
    energy = torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)  # (B, min(N, D)), descending
    leading = -(-energy.shape[-1] * share // 1)
    return energy[:, : int(leading)].sum(-1) / energy.sum(-1)


def neighbour_distance(tokens: Tensor) -> Tensor:
    """Compute the distance to the nearest token, as a share of the distance to any token: (B, N, D) -> (B,), in 0..1.

    Both distances are means over tokens. A lower share means more redundant tokens.
    """
    distance = torch.cdist(tokens.float(), tokens.float())  # (B, N, N)
    n = tokens.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=tokens.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(-1).mean(-1)
    return nearest / (distance.sum((-1, -2)) / (n * (n - 1)))


def mean_energy(tokens: Tensor) -> Tensor:
    """Compute the share of the tokens' energy in their mean, the lowest frequency: (B, N, D) -> (B,), in 0..1."""
    return tokens.float().mean(1).square().sum(-1) / tokens.float().square().sum(-1).mean(1)


@torch.no_grad()
def signals(model: nn.Module, images: Tensor) -> list[Signals]:
    """Run a plain model on images (B, C, H, W), and return each block's signals.

    Raises:
        TypeError: if the model belongs to no supported family.
        ValueError: if the model is patched: its tokens become fewer from block to block.
    """
    adapter = hosts.of(model)
    if adapter.is_patched:
        raise ValueError("redundancy is measured in a plain model; call tokenpool.unpatch first")
    prefix = adapter.prefix
    seen: list[dict[str, Tensor]] = [{} for _ in adapter.blocks]

    def record_in(found: dict[str, Tensor]) -> Callable[[str, Tensor], None]:
        return lambda name, signal: found.update({name: signal[..., prefix:, :]})

    handles: list[RemovableHandle] = []
    for block, found in zip(adapter.blocks, seen, strict=True):
        handles += adapter.watch_attention(block, record_in(found))
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [Signals(**found) for found in seen]
