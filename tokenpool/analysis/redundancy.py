"""Measure how redundant tokens are: attention is a low-pass filter (Marin et al. 2021, section 3.3)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tokenpool import hosts


class Signals(NamedTuple):
    """Input and output of the attention of one block, for patch tokens only.

    Attributes:
        queries: (B, H, N, d).
        keys: (B, H, N, d).
        values: (B, N, D), the signal that attention filters, with concatenated heads.
        filtered: (B, N, D), the filtered signal. The attention includes all tokens, also the class token.
        before: (B, N, D), the tokens before attention.
        after: (B, N, D), the tokens plus the output of attention: the input of a downsampler.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    filtered: Tensor
    before: Tensor
    after: Tensor


def softmax_attention(queries: Tensor, keys: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Compute softmax attention, equation (6).

    Args:
        queries: (..., N, d).
        keys: (..., N, d).
        values: (..., N, D).
        alpha: factor of the logits.

    Returns:
        (..., N, D).
    """
    return (alpha * queries @ keys.mT).softmax(-1) @ values


def gaussian_filter(queries: Tensor, keys: Tensor, values: Tensor, alpha: float) -> Tensor:
    """Compute a Gaussian filter, equation (7): values at the keys are filtered and sampled at the queries.

    The variance of the Gaussian is 1 / alpha. The result equals `softmax_attention` if all queries and keys have the
    same length.

    Args:
        queries: (..., N, d).
        keys: (..., N, d).
        values: (..., N, D).
        alpha: inverse variance.

    Returns:
        (..., N, D).
    """
    distance = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")  # (..., N, N)
    kernel = (-alpha / 2 * distance.square()).exp()
    return kernel @ values / kernel.sum(-1, keepdim=True)


def leading_energy(tokens: Tensor, share: float = 0.1) -> Tensor:
    """Compute the share of the variance of tokens that lies in their leading singular vectors.

    The tokens are centred first. A higher share means more redundant tokens.

    Args:
        tokens: (B, N, D).
        share: share of the min(N, D) singular vectors that count as leading. The number of vectors is rounded up.

    Returns:
        (B,), in 0..1.
    """
    tokens = tokens.double() - tokens.double().mean(1, keepdim=True)
    gram = tokens @ tokens.mT if tokens.shape[1] < tokens.shape[2] else tokens.mT @ tokens
    energy = torch.linalg.eigvalsh(gram).clamp(min=0).flip(-1)  # (B, min(N, D)), descending
    leading = -(-energy.shape[-1] * share // 1)
    return energy[:, : int(leading)].sum(-1) / energy.sum(-1)


def neighbour_distance(tokens: Tensor) -> Tensor:
    """Compute the mean distance to the nearest other token, divided by the mean distance between two tokens.

    A lower value means more redundant tokens.

    Args:
        tokens: (B, N, D).

    Returns:
        (B,), in 0..1.
    """
    distance = torch.cdist(tokens.float(), tokens.float())  # (B, N, N)
    n = tokens.shape[1]
    itself = torch.eye(n, dtype=torch.bool, device=tokens.device)
    nearest = distance.masked_fill(itself, torch.inf).amin(-1).mean(-1)
    return nearest / (distance.sum((-1, -2)) / (n * (n - 1)))


def mean_energy(tokens: Tensor) -> Tensor:
    """Compute the share of the energy of tokens that lies in their mean, the lowest frequency.

    Args:
        tokens: (B, N, D).

    Returns:
        (B,), in 0..1.
    """
    return tokens.float().mean(1).square().sum(-1) / tokens.float().square().sum(-1).mean(1)


@torch.no_grad()
def signals(model: nn.Module, images: Tensor) -> list[Signals]:
    """Run a plain model on images, and return the signals of each block.

    Args:
        model: a plain model of a family in `tokenpool.hosts`.
        images: (B, C, H, W).

    Raises:
        TypeError: if the model belongs to no supported family.
        ValueError: if the model is patched, because the number of tokens then differs between blocks.
    """
    adapter = hosts.of(model)
    if adapter.is_patched:
        raise ValueError("redundancy is measured in plain models only: call tokenpool.unpatch first")
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
