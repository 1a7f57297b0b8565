"""Attention that also returns significance scores, weighs keys by size, and can normalise queries and keys."""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenpool import gpu, micro_batch
from tokenpool.adoption import adopt, give_back, reference
from tokenpool.eager import at_least_float32, cast, detached, is_in_graph, needs_gradient
from tokenpool.operators import is_opaque, opaque


class Asked(NamedTuple):
    """The input of an attention besides the tokens, and the results that a block asks for besides the output.

    Attributes:
        sizes: (B, N), the number of original tokens that each token stands for. The log of the size is added to the
            logits of the token's key. So one token of size s gets as much attention as s equal tokens (the paper's
            *carry*, appendix E; *proportional attention* in Bolya et al. 2023). A token of size zero gets no attention.
        table: (B or 1, H or 1, M, W), the rotary table of the last M tokens. The other tokens are not rotated.
        scores: whether to return the significance scores.
        keys: whether to return the keys.
        class_attention: whether to return the attention of the class token.
    """

    sizes: Tensor | None = None
    table: Tensor | None = None
    scores: bool = False
    keys: bool = False
    class_attention: bool = False


_NOTHING = Asked()


class Attended(NamedTuple):
    """Result of an attention.

    Attributes:
        output: (B, N, D).
        scores: (B, N) or None, the significance scores, equation (5): the attention that each token receives, summed
            over heads and queries. float32 or float64, without gradient.
        keys: (B, N, d) or None, the mean over heads, before they are rotated, without gradient.
        class_attention: (B, N) or None, see `class_attention`.
    """

    output: Tensor
    scores: Tensor | None
    keys: Tensor | None
    class_attention: Tensor | None = None


@torch.no_grad()
def class_attention(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Compute the attention of the first token, which is the class token, to all tokens.

    It is one row of the attention matrix. Fused attention does not return the matrix, so the row is computed again.
    The FLOPs of the matrix contain the row already. So it is computed without a matrix product, and counts as free.

    Args:
        q: (B, H, N, d), queries.
        k: (B, H, N, d), keys.
        bias: (B, N) or None, a number for each key that is added to the logits.
        scale: factor of the products of queries and keys.

    Returns:
        (B, N), the mean over heads, float32 or float64, without gradient. Each row sums to 1.
    """
    logits = (cast(q[:, :, :1], at_least_float32(q.dtype)) * k).sum(dim=-1) * scale  # (B, H, N)
    return (logits if bias is None else logits + bias.unsqueeze(1)).softmax(dim=-1).mean(dim=1)


class ScoredAttention(nn.Module):
    """timm's `Attention` plus significance scores, proportional attention and l2-normalised queries and keys.

    The module adopts the submodules and parameters of the model's own attention under the same names, so that
    checkpoints stay the same. A learned alpha adds one parameter, `alpha`. For other attentions than timm's
    `Attention`, a subclass replaces `heads_of`, `project`, `rotate`, `dropout` and `finish`.

    Class attributes that a subclass sets:
        OWN: names of parameters and buffers of the attention itself. All others belong to its submodules.

    Args:
        host: the attention to adopt. It has the attributes `num_heads` and `head_dim`, and `scale` if the logits are
            not multiplied by 1 / sqrt(d).
        qk_norm: None, or "l2" to normalise queries and keys to unit length and to multiply the logits of equation (6)
            by `alpha` instead of 1 / sqrt(d) (Marin et al. 2021, appendix F).
        alpha: the (initial) scalar alpha > 0 of equation (6), for `qk_norm="l2"`.
        learn_alpha: make alpha a parameter.
    """

    OWN: ClassVar[tuple[str, ...]] = ()

    qkv: nn.Module
    q_norm: nn.Module
    k_norm: nn.Module
    attn_drop: nn.Dropout
    proj: nn.Module
    proj_drop: nn.Module

    def __init__(self, host: Any, qk_norm: str | None = None, alpha: float = 1.0, learn_alpha: bool = False) -> None:
        super().__init__()
        adopt(self, host)
        self._host = (host,)  # a tuple, so that PyTorch does not register the attention as a submodule
        self.num_heads, self.head_dim, self.scale = self.heads_of(host)
        self.normalise = qk_norm == "l2"
        if self.normalise:
            self.alpha = nn.Parameter(reference(host).new_tensor(float(alpha))) if learn_alpha else float(alpha)

    @staticmethod
    def heads_of(host: Any) -> tuple[int, int, float]:
        """Return the number of heads, the width d of a head, and the scale of the logits, usually 1 / sqrt(d)."""
        return host.num_heads, host.head_dim, getattr(host, "scale", host.head_dim**-0.5)

    def give_back(self) -> nn.Module:
        """Return the model's own attention, with the submodules that are in this module now."""
        give_back(self, self._host[0], but=("alpha",))
        return self._host[0]

    def forward(self, x: Tensor, asked: Asked = _NOTHING) -> Attended:
        """Compute the attention.

        Args:
            x: (B, N, D).
            asked: other inputs, and the results to return.
        """
        q, k, v = self.project(x)
        scale = self.scale
        if self.normalise:
            q, k = F.normalize(q, dim=-1) * self.alpha, F.normalize(k, dim=-1)
            scale = 1.0
        keys = detached(k).mean(dim=1) if asked.keys else None
        if asked.table is not None:
            q, k = self.rotate(q, asked.table).to(v.dtype), self.rotate(k, asked.table).to(v.dtype)
        bias = None if asked.sizes is None else cast(asked.sizes.log(), q.dtype)  # (B, N)
        dropout = self.dropout if self.training else 0.0
        scores: Tensor | None

        fits = asked.scores and gpu.attention_fits(q, k, v)
        if fits and dropout == 0.0 and not torch.is_grad_enabled():
            out, scores = gpu.attention(q, k, v, bias, scale)
            out = out.transpose(1, 2).flatten(2)
        elif asked.scores and not fits:
            if is_opaque(q) and (dropout or needs_gradient(q, k, v)):  # the operator has no gradient
                out, scores = attend_in_parts(q, k, v, bias, scale, dropout)
            else:
                out, scores = scored_attention(q, k, v, bias, scale, dropout)
        else:
            scores = gpu.received(q, k, bias, scale) if asked.scores else None
            mask = None if bias is None else bias.unsqueeze(1).unsqueeze(1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale)
            out = out.transpose(1, 2).flatten(2)

        row = class_attention(q, k, bias, scale) if asked.class_attention else None
        return Attended(self.finish(out, x), scores, keys, row)

    @property
    def dropout(self) -> float:
        """Probability that training drops an entry of the attention."""
        return self.attn_drop.p

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, keys and values, (B, H, N, d) each, of tokens (B, N, D)."""
        batch, n, _ = x.shape
        qkv = self.qkv(x).reshape(batch, n, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def rotate(self, values: Tensor, table: Tensor) -> Tensor:
        """Rotate queries or keys (B, H, N, d) by their positions. Only subclasses have rotary positions.

        Args:
            values: (B, H, N, d).
            table: (B or 1, H or 1, M, W), the rotary table of the last M tokens. The other tokens are not rotated.
        """
        raise NotImplementedError

    def finish(self, out: Tensor, x: Tensor) -> Tensor:
        """Project the output of the heads.

        Args:
            out: (B, N, H d), the output of all heads.
            x: (B, N, D), the input of the attention, which a gate may read.

        Returns:
            (B, N, D).
        """
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)
        out = out if norm is None else norm(out)
        out = out if gate is None else out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def attend_in_parts(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Compute the output of an attention and the significance scores, for some heads and queries at a time.

    Args:
        q: (B, H, N, d), queries.
        k: (B, H, N, d), keys.
        v: (B, H, N, d), values.
        bias: (B, N) or None, a number for each key that is added to the logits.
        scale: factor of the products of queries and keys.
        dropout: probability that an entry of the attention is dropped.

    Returns:
        Output (B, N, H d) and scores (B, N), the attention that each token receives.
    """
    heads, rows = _micro_batch(q)
    parts = zip(_split(q, heads, 1), _split(k, heads, 1), _split(v, heads, 1), strict=True)
    outs, received = zip(*(_attend(*part, bias, scale, dropout, rows) for part in parts), strict=True)
    out = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]  # (B, N, H d)
    return out, torch.stack(received).sum(dim=0) if len(received) > 1 else received[0]


def _empty_results(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    batch, heads, n, _ = q.shape
    return v.new_empty(batch, n, heads * v.shape[3]), q.new_empty(batch, n, dtype=at_least_float32(q.dtype))


@opaque(_empty_results)
def scored_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float
) -> tuple[Tensor, Tensor]:
    """Compute the same as `attend_in_parts`. It is one operator of a graph that is compiled for a CPU."""
    return attend_in_parts(q, k, v, bias, scale, dropout)


def _micro_batch(q: Tensor) -> tuple[int, int]:
    """Return how many heads and queries of queries (B, H, N, d) are computed at a time.

    On a CPU, their attention matrices fit into the cache. On other devices they take at most 1 GiB. All heads and
    queries are computed at once if autograd keeps the whole attention anyway, and in a graph, because a graph must
    not depend on the batch size.
    """
    batch, heads, n, _ = q.shape
    if torch.is_grad_enabled() or is_in_graph():
        return heads, n
    budget = micro_batch.ATTENTION.on(q.device)
    if q.device.type == "cpu" and batch > 1:  # the heads of several images do not lie side by side
        some = 1
    else:
        some = min(micro_batch.max_items(batch * n * n, budget), heads)
    return some, min(micro_batch.max_items(batch * n, budget), n) if some == 1 else n


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, dropout: float, rows: int
) -> tuple[Tensor, Tensor]:
    """Return output (B, N, h d) and received attention (B, N) of h heads, computed for `rows` queries at a time."""
    outs: list[Tensor] = []
    received: Tensor | None = None
    for some in _split(q * scale, rows, 2):
        logits = some @ k.mT  # (B, h, rows, N)
        attention = (logits if bias is None else logits + bias.unsqueeze(1).unsqueeze(1)).softmax(dim=-1)
        part = detached(attention).sum(dim=(1, 2), dtype=at_least_float32(attention.dtype))
        received = part if received is None else received + part
        outs.append(cast(F.dropout(attention, dropout) if dropout else attention, v.dtype) @ v)
    out = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]  # (B, h, rows, d)
    assert received is not None
    return out.transpose(1, 2).flatten(2), received


def _split(values: Tensor, size: int, dim: int) -> Sequence[Tensor]:
    """Split a tensor into parts of `size`. A graph contains nothing of a single part."""
    return [values] if size >= values.shape[dim] else values.split(size, dim)
