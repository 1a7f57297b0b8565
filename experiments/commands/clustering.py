"""The command that times clustering: `clustering-speed`."""

from typing import Annotated

import typer

from tokenpool.tools import benchmark


def clustering_speed(
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    tokens: Annotated[int, typer.Option(min=1, help="Of an image, N.")] = 196,
    clusters: Annotated[int, typer.Option(min=1, help="Of an image, K.")] = 98,
    width: Annotated[int, typer.Option(min=1, help="Of a token, D.")] = 384,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    repeats: Annotated[int, typer.Option(min=1, help="Times that are taken of each.")] = 7,
) -> None:
    """Time weighted K-Medoids against an implementation that loops over images and clusters in Python."""
    if clusters > tokens:
        raise ValueError(f"--clusters {clusters} are more than --tokens {tokens}")
    taken = benchmark.clustering_speed(batch_size, tokens, clusters, width, device, repeats)
    own = taken["kmedoids"]
    print(f"kmedoids: {1000 * own:.2f} ms")
    print(f"looped in Python: {1000 * taken['looped']:.1f} ms, {taken['looped'] / own:.0f} times that")
    early = taken["looped_ending_early"]
    print(f"looped in Python, ending early as kmedoids does: {1000 * early:.1f} ms, {early / own:.0f} times that")
