"""EViT: keep the tokens that the class token attends to, and fuse the others."""

import torch
from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler


class EViT(Downsampler):
    """EViT (Liang et al. 2022, section 3): keep K - 1 attentive tokens and fuse the others into one token.

    The attentiveness a_i of token i is the attention of the class token to it, the mean over heads. The K - 1 tokens of
    highest a_i remain in their order. The other tokens become one token, the last one:

        x_fused = (sum of a_i x_i) / (sum of a_i), over the tokens that are not kept

    Paper and published code differ from this in three ways. They do not divide by the sum of a_i, although the paper
    calls the fused token a weighted average; here it is one, so that its length does not depend on the number of fused
    tokens. They count the kept tokens only; here the schedule counts the fused token, so that all methods keep K
    tokens. Their a_i has a gradient; here it has none. They have no proportional attention (`carry=False`).

    In a later block, the fused token of an earlier block is a token like the others, in the published code and here: it
    is kept or fused again by its own attentiveness. The paper does not discuss this case.
    """

    uses_scores = False
    uses_class_attention = True
    merges = True

    def reduce(self, tokens: Tensor, scores: Tensor | None, *, class_attention: Tensor) -> Downsampled:
        batch, n, _ = tokens.shape
        kept = clustering.stable_topk(class_attention, self.keep - 1).sort(dim=1).values  # (B, K - 1)
        places = torch.arange(self.keep - 1, device=tokens.device).expand(batch, -1)
        assignment = torch.full((batch, n), self.keep - 1, device=tokens.device).scatter(1, kept, places)
        weights = clustering.positive(class_attention)  # without attention: equal weights
        return Downsampled(clustering.means(tokens, weights, assignment, self.keep), assignment)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return 0  # sorting and sums are free, and the attention is a part of the model's
