"""DPC-KNN: clusters around density peaks."""

from numbers import Integral

from torch import Tensor

from tokenpool import clustering
from tokenpool.downsampling.contract import Downsampled, Downsampler


class DPCKNN(Downsampler):
    """DPC-KNN (Du et al. 2016) as in TCFormer (Zeng et al. 2022, section 3.2): clusters around K density peaks.

    With d_ij = |x_i - x_j| / sqrt(D), the distance of tokens:

        rho_i   = exp(-mean of d_ij^2 over the nearest neighbours j of i)
        delta_i = min of d_ij over the tokens j with rho_j > rho_i;  max of d_ij for the densest token

    The K tokens of highest rho_i delta_i are the centres, and each token goes to the nearest centre (see
    `clustering.density_peaks`). A cluster becomes the mean of its tokens, weighted by size.

    TCFormer weighs the tokens of a cluster by importance scores of a learned linear layer. A model that is not trained
    with it has none, so the weights are the sizes. The published code counts the token itself as its first neighbour;
    here a token is no neighbour of itself. The code divides by sqrt(D), as here; the equations do not. It takes the
    highest distance of the image for the densest token; this does not matter, because this token ranks first in any
    case. It adds random noise to the densities to break ties; here the first token wins. TCFormer has no proportional
    attention, but adds the importance scores to the logits.

    Args:
        keep: maximum number of clusters.
        neighbours: number of nearest neighbours.

    Raises:
        ValueError: if `neighbours` is not a whole number of at least 1.
    """

    uses_scores = False
    uses_sizes = True
    merges = True

    def __init__(self, keep: int, neighbours: int = 5) -> None:
        super().__init__(keep)
        if not isinstance(neighbours, Integral) or isinstance(neighbours, bool) or neighbours < 1:
            raise ValueError(f"neighbours = {neighbours!r} must be a whole number, at least 1")
        self.neighbours: int = neighbours

    def reduce(self, tokens: Tensor, scores: Tensor | None, *, sizes: Tensor) -> Downsampled:
        assignment = clustering.density_peaks(tokens, self.keep, self.neighbours)
        return Downsampled(clustering.means(tokens, sizes, assignment, self.keep), assignment)

    def macs(self, n: int, width: int, key_width: int) -> int:
        return n * n * width  # all distances, once
