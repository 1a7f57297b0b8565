"""Rotary positions of merged tokens.

A rotary position embedding rotates each query and key by angles that belong to one place of the grid. A merged token
has several places. Its row of the table of sines and cosines is the mean of the rows of its patches. A logit is linear
in the row of the query and in the row of the key. So for patches of equal content, the logit between two merged tokens
is exactly the mean of the logits between their patches. The mean needs no knowledge of the kind of table.
"""

import torch
from torch import Tensor, nn

from tokenpool import clustering
from tokenpool.clustering.reductions import best_members, largest
from tokenpool.eager import at_least_float32

POSITIONS = ("mean", "medoid")
_STEPS = 1000


class MergedPositions(nn.Module):
    """The rotary table of the current tokens, from the table of all patches.

    A table has the shape (B or 1, H or 1, N, W). A row of W floats has the sines and the cosines of a place. The row of
    a token is the mean of the rows of its patches, or the row of one patch if places are given.
    """

    def forward(self, table: Tensor, assignment: Tensor, places: Tensor | None, k: int) -> Tensor:
        """Compute the table of K tokens.

        Args:
            table: (B or 1, H or 1, N, W), the table of all patches.
            assignment: (B, N), the token of each patch, or -1 for a dropped patch.
            places: (B, K), the patch whose row each token gets, or None for the mean.
            k: number of tokens.

        Returns:
            (B, H or 1, K, W).
        """
        batch = assignment.shape[0]  # len() would fix the batch size of an exported graph
        heads, width = table.shape[1], table.shape[3]
        if places is not None:
            index = places[:, None, :, None].expand(-1, heads, -1, width)
            return table.expand(batch, -1, -1, -1).gather(2, index)
        rows = table.transpose(1, 2).flatten(2).expand(batch, -1, -1)  # (B, N, H W)
        weights = (assignment >= 0).to(at_least_float32(table.dtype))
        found = clustering.means(rows, weights, assignment + 1, k + 1)[:, 1:]  # cluster 0 has the dropped patches
        return found.view(batch, k, heads, width).transpose(1, 2)

    def macs(self, table: Tensor, assignment: Tensor, places: Tensor | None, k: int) -> int:
        """Return the multiply-adds of one call: one for each float of each patch. Copying rows is free."""
        return 0 if places is not None else int(assignment.numel()) * int(table.shape[1]) * int(table.shape[3])


def representatives(tokens: Tensor, kept: Tensor, assignment: Tensor) -> Tensor:
    """Find the medoid of each output token: the input token that is merged into it and is most similar to it.

    Args:
        tokens: (B, N, D), the input of a downsampler.
        kept: (B, K, D), the output tokens.
        assignment: (B, N), the output token of each input token, or -1.

    Returns:
        Indices (B, K) of input tokens, the one at the smallest Euclidean distance. Of members whose squared distances
        differ by less than a thousandth of the largest one, the first member counts as nearest.
    """
    k = kept.shape[1]
    if k == 0:
        return assignment[:, :0]
    own = kept.gather(1, assignment.clamp(min=0)[:, :, None].expand(-1, -1, kept.shape[2]))
    distance = (tokens - own).detach().float().square().sum(dim=-1)  # (B, N)
    none = assignment.new_zeros(assignment.shape[0], k + 1)
    # Both members of a pair are equally far from their mean, and rounding must not choose between them. So distances
    # count in steps of the largest distance in the cluster, and the first of equal members wins.
    farthest = largest(distance, assignment + 1, k + 1)
    steps = (_STEPS * distance / farthest.gather(1, assignment + 1).clamp(min=torch.finfo(torch.float32).tiny)).round()
    return best_members(steps, torch.ones_like(steps), assignment + 1, none)[:, 1:]
