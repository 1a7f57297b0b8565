"""Masks of padding. Other attention masks cannot be kept, because a merged token has several places."""

from typing import Any

import torch
from torch import Tensor

from tokenpool.eager import is_in_graph

_HIDDEN = -1e4  # the softmax of a logit with this addend is zero in all dtypes


def valid_patches(mask: Any, tokens: Tensor, prefix: int) -> Tensor:
    """Return the patches that are not padding, (B, N) bool. In a graph, the values of the mask are not checked.

    Args:
        mask: a mask as `scaled_dot_product_attention` takes it, see `valid_tokens`.
        tokens: (B, P + N, D).
        prefix: number P of prefix tokens.

    Raises:
        ValueError: if the mask is not a mask of padding, or hides a prefix token.
    """
    batch, n, _ = tokens.shape
    if not isinstance(mask, Tensor) or not 2 <= mask.dim() <= 4 or mask.shape[-1] != n:
        raise ValueError(_not_padding(f"has the wrong form for {n} tokens"))
    valid = valid_tokens(mask)
    if not is_in_graph() and not valid[:, :prefix].all():
        raise ValueError(_not_padding("hides a class or register token"))
    return valid[:, prefix:].expand(batch, -1)


def valid_tokens(mask: Tensor) -> Tensor:
    """Read an attention mask of padding.

    Args:
        mask: (S, S) or (B or 1, H or 1, S or 1, S): bool, or 0 for visible and a very negative number for hidden
            tokens. The rows of padding may have any values.

    Returns:
        (B or 1, S) bool, the tokens that are visible.

    Raises:
        ValueError: if the mask is not a mask of padding: all tokens that are not padding see the same tokens.
    """
    visible = mask if mask.dtype == torch.bool else mask == 0
    visible = visible.reshape((1,) * (4 - mask.dim()) + mask.shape)
    valid = visible[:, 0].any(dim=1)  # (B or 1, S)
    if is_in_graph():
        return valid
    if mask.dtype != torch.bool and not (visible.view_as(mask) | (mask <= _HIDDEN)).all():
        raise ValueError(_not_padding("weighs tokens"))
    agrees = visible == valid[:, None, None, :]
    if visible.shape[2] > 1:
        agrees |= ~valid[:, None, :, None]
    if not agrees.all():
        raise ValueError(_not_padding("differs from query to query, or from head to head"))
    return valid


def _not_padding(fault: str) -> str:
    return f"a pooled model takes attention masks of padding only, but the mask {fault}: call tokenpool.unpatch first"
