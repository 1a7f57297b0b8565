"""EViT, ATC, DPC-KNN and PiToMe: each against a plain loop in NumPy that is written from its paper."""

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenpool
from tokenpool import clustering, flops, hosts
from tokenpool.downsampling import ATC, DPCKNN, EViT, PiToMe
from tokenpool.downsampling.atc import LINKAGES

METHODS = {"evit": EViT, "atc": ATC, "dpc_knn": DPCKNN, "pitome": PiToMe}
KEEP = [30, 17, 5, 2]
SOME = settings(max_examples=25, deadline=None, derandomize=True)
SEEDS = st.integers(0, 10_000)
Groups = list[list[int]]


def inputs(seed: int, n: int, batch: int = 2, width: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(batch, n, width, generator=generator, dtype=torch.float64),
        "keys": torch.randn(batch, n, 3, generator=generator, dtype=torch.float64),
        "sizes": torch.randint(1, 6, (batch, n), generator=generator).double(),
        "class_attention": torch.rand(batch, n, generator=generator, dtype=torch.float64),
    }


def apply(layer: tokenpool.Downsampler, given: dict[str, torch.Tensor]) -> tokenpool.Downsampled:
    hints = {name: given[name] for name in ("sizes", "keys", "class_attention") if getattr(layer, f"uses_{name}")}
    return layer(given["tokens"], None, **hints)


def check(
    layer: tokenpool.Downsampler, given: dict[str, torch.Tensor], groups_of: Callable[..., Groups], weights: str
) -> None:
    """The layer's groups and weighted means are those of a loop over the arrays of one image."""
    found = apply(layer, given)
    for image in range(len(given["tokens"])):
        arrays = {name: values[image].numpy() for name, values in given.items()}
        groups = groups_of(**arrays)
        assert sorted(i for group in groups for i in group) == list(range(len(arrays["tokens"])))
        assert found.assignment[image].tolist() == [
            next(index for index, group in enumerate(groups) if token in group)
            for token in range(len(arrays["tokens"]))
        ]
        for group, token in zip(groups, found.tokens[image], strict=True):
            mean = sum(arrays[weights][i] * arrays["tokens"][i] for i in group) / sum(arrays[weights][group])
            np.testing.assert_allclose(token, mean, rtol=1e-9, atol=1e-12)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / math.sqrt(a @ a) / math.sqrt(b @ b))


# EViT


def attentive_groups(keep: int, class_attention: np.ndarray, **unused: Any) -> Groups:
    order = sorted(range(len(class_attention)), key=lambda i: (-class_attention[i], i))
    return [[i] for i in sorted(order[: keep - 1])] + [sorted(order[keep - 1 :])]


@SOME
@given(seed=SEEDS, n=st.integers(2, 20), keep=st.integers(1, 19))
def test_evit_is_the_loop(seed: int, n: int, keep: int) -> None:
    keep = min(keep, n - 1)
    given = inputs(seed, n)
    check(EViT(keep), given, lambda **arrays: attentive_groups(keep, **arrays), "class_attention")
    given["class_attention"] = torch.randint(1, 3, (2, n), generator=torch.Generator().manual_seed(seed)).double()
    check(EViT(keep), given, lambda **arrays: attentive_groups(keep, **arrays), "class_attention")  # ties


def test_evit_takes_the_attention_of_the_class_token(small, photos) -> None:
    """The first block by hand, from timm's weights. Sizes count as those of original tokens."""
    tokens = small._pos_embed(small.patch_embed(photos))
    block = small.blocks[0]
    q, k, _ = block.attn.qkv(block.norm1(tokens)).reshape(5, 37, 3, 3, 16).permute(2, 0, 3, 1, 4)
    attention = (q @ k.mT / 4).softmax(-1).mean(1)[:, 0, 1:].numpy(force=True)  # (B, N)
    tokenpool.patch(small, "evit", KEEP, carry=False)
    found = tokenpool.trace(small, photos).blocks
    for image in range(5):
        groups = attentive_groups(30, attention[image])
        assert [np.flatnonzero(found[0].assignment[image] == index).tolist() for index in range(30)] == groups
    assert [block.tokens for block in found] == KEEP


def test_evit_fuses_a_fused_token_again_if_its_attention_is_low() -> None:
    given = inputs(0, 6, batch=1)
    given["class_attention"] = torch.tensor([[0.1, 0.5, 0.2, 0.4, 0.3, 0.05]], dtype=torch.float64)
    first = apply(EViT(4), given)
    assert first.assignment.tolist() == [[3, 0, 3, 1, 2, 3]]
    for attention, expected in (([0.1, 0.2, 0.3, 0.4], [2, 2, 0, 1]), ([0.4, 0.3, 0.2, 0.1], [0, 1, 2, 2])):
        hint = torch.tensor([attention], dtype=torch.float64)
        assert EViT(3)(first.tokens, None, class_attention=hint).assignment.tolist() == [expected]


def test_evit_without_any_attention_fuses_into_the_plain_mean() -> None:
    tokens = torch.randn(2, 7, 4)
    found = EViT(1)(tokens, None, class_attention=torch.zeros(2, 7))
    torch.testing.assert_close(found.tokens, tokens.mean(dim=1, keepdim=True))


# ATC


def agglomerated_groups(keep: int, linkage: str, keys: np.ndarray, **unused: Any) -> Groups:
    combine = {"average": lambda values: sum(values) / len(values), "complete": max, "single": min}[linkage]
    groups = [[i] for i in range(len(keys))]
    while len(groups) > keep:
        one, other = min(
            combinations(groups, 2),
            key=lambda pair: combine([1 - cosine(keys[i], keys[j]) for i in pair[0] for j in pair[1]]),
        )
        groups = sorted([group for group in groups if group not in (one, other)] + [sorted(one + other)])
    return groups


@SOME
@given(seed=SEEDS, n=st.integers(2, 12), keep=st.integers(1, 11), linkage=st.sampled_from(LINKAGES))
def test_atc_is_the_loop(seed: int, n: int, keep: int, linkage: str) -> None:
    keep = min(keep, n - 1)
    check(ATC(keep, linkage), inputs(seed, n), lambda **arrays: agglomerated_groups(keep, linkage, **arrays), "sizes")


# DPC-KNN


def density_groups(keep: int, neighbours: int, tokens: np.ndarray, **unused: Any) -> Groups:
    n, width = tokens.shape
    distance = [[math.dist(a, b) / math.sqrt(width) for b in tokens] for a in tokens]
    rho = []
    for i in range(n):
        nearest = sorted(distance[i][j] for j in range(n) if j != i)[:neighbours]
        rho.append(math.exp(-sum(d * d for d in nearest) / len(nearest)))
    delta = []
    for i in range(n):
        denser = [distance[i][j] for j in range(n) if (round(rho[j], 13), -j) > (round(rho[i], 13), -i)]
        delta.append(min(denser) if denser else max(distance[i]))
    order = sorted(range(n), key=lambda i: (-round(rho[i] * delta[i], 13), i))
    centres = sorted(order[:keep])
    groups: Groups = [[] for _ in centres]
    for i in range(n):
        own = centres.index(i) if i in centres else min(range(keep), key=lambda c: distance[i][centres[c]])
        groups[own].append(i)
    return groups


@SOME
@given(seed=SEEDS, n=st.integers(2, 20), keep=st.integers(1, 19), neighbours=st.integers(1, 7))
def test_dpc_knn_is_the_loop(seed: int, n: int, keep: int, neighbours: int) -> None:
    keep = min(keep, n - 1)
    check(
        DPCKNN(keep, neighbours), inputs(seed, n), lambda **arrays: density_groups(keep, neighbours, **arrays), "sizes"
    )


@SOME
@given(seed=SEEDS, half=st.integers(2, 8), keep=st.integers(1, 15))
def test_dpc_knn_of_equal_densities_and_distances_is_the_loop(seed: int, half: int, keep: int) -> None:
    """Whole numbers with mean zero, so that distances do not round. Many tokens are equal."""
    n, given = 2 * half, inputs(seed, 2 * half)
    points = torch.randint(-1, 2, (2, half, 4), generator=torch.Generator().manual_seed(seed)).double()
    given["tokens"] = torch.cat([points, -points], dim=1)
    keep = min(keep, n - 1)
    check(DPCKNN(keep), given, lambda **arrays: density_groups(keep, 5, **arrays), "sizes")


def test_dpc_knn_does_not_underflow() -> None:
    """exp(-1000) is zero in float32, but densities are compared all the same."""
    tokens = torch.randn(1, 12, 4)
    sizes = torch.ones(1, 12)
    tokens[0, :6] += 20  # two groups, far from each other
    for scale in (1.0, 100.0):
        found = DPCKNN(2)(scale * tokens, None, sizes=sizes).assignment[0]
        assert found.tolist() == [0] * 6 + [1] * 6


# PiToMe


def merged_by_energy(keep: int, margin: float, keys: np.ndarray, sizes: np.ndarray, **unused: Any) -> Groups:
    groups = [[i] for i in range(len(keys))]
    while (n := len(groups)) > keep:
        key = [sum(sizes[i] * keys[i] for i in group) / sum(sizes[group]) for group in groups]
        similarity = [[cosine(a, b) for b in key] for a in key]
        energy = [sum(x if x >= margin else math.exp(x - margin) - 1 for x in row) / n for row in similarity]
        r = min(n - keep, n // 2)
        mergeable = sorted(range(n), key=lambda i: -energy[i])[: 2 * r]
        into = {a: max(mergeable[1::2], key=lambda b: similarity[a][b]) for a in mergeable[::2]}
        new = [sorted(groups[i] + [token for a in into if into[a] == i for token in groups[a]]) for i in range(n)]
        groups = [new[i] for i in range(n) if i not in into]
    return groups


@SOME
@given(seed=SEEDS, n=st.integers(2, 20), keep=st.integers(1, 19), margin=st.floats(-0.5, 0.9))
def test_pitome_is_the_loop(seed: int, n: int, keep: int, margin: float) -> None:
    keep = min(keep, n - 1)
    layer = PiToMe(keep, margin)
    check(layer, inputs(seed, n), lambda **arrays: merged_by_energy(keep, margin, **arrays), "sizes")


def test_pitome_protects_tokens_of_low_energy() -> None:
    """Six equal keys and two different ones. The different ones stay alone, in any place."""
    keys = torch.tensor([[1.0, 0, 0]] * 6 + [[0, 1.0, 0], [0, 0, 1.0]])[None]
    keys = keys[:, [6, 0, 1, 7, 2, 3, 4, 5]]
    found = PiToMe(5)(torch.randn(1, 8, 4), None, sizes=torch.ones(1, 8), keys=keys).assignment[0]
    different, equal = found[[0, 3]], found[[1, 2, 4, 5, 6, 7]]
    assert len(set(different.tolist())) == 2 and not set(different.tolist()) & set(equal.tolist())


def test_the_margin_of_pitome_falls_with_the_depth(small) -> None:
    tokenpool.patch(small, "pitome", KEEP)
    assert [block.downsampler.margin for block in small.blocks] == [0.75, 0.5625, 0.375, 0.1875]
    tokenpool.patch(small, "pitome", KEEP, margin=0.9)
    assert [block.downsampler.margin for block in small.blocks] == pytest.approx([0.9, 0.675, 0.45, 0.225])


# All of them


@pytest.mark.parametrize("name", METHODS)
@SOME
@given(seed=SEEDS, n=st.integers(2, 20), keep=st.integers(1, 19))
def test_every_output_token_has_tokens(name: str, seed: int, n: int, keep: int) -> None:
    keep = min(keep, n - 1)
    given = inputs(seed, n)
    given["tokens"][:, n // 2 :] = given["tokens"][:, :1]  # some tokens are equal
    given["keys"][:, n // 2 :] = given["keys"][:, :1]
    for image in apply(METHODS[name](keep), given).assignment:
        assert sorted(set(image.tolist())) == list(range(keep))


@pytest.mark.parametrize("name", METHODS)
def test_the_counted_cost_is_the_formula(small, name: str) -> None:
    tokenpool.patch(small, name, KEEP)
    key_width = hosts.of(small).layers(small.blocks[0]).head_dim
    expected = sum(
        block.downsampler.macs(n, 48, key_width) for n, block in zip([36, *KEEP], small.blocks, strict=False)
    )
    assert round(flops.count(small).clustering_gmacs * 1e9) == expected
    assert (expected > 0) == (name != "evit")


@pytest.mark.parametrize("name", METHODS)
def test_groups_are_formed_in_float32_under_autocast(name: str) -> None:
    given = {key: value.float() for key, value in inputs(0, 60).items()}
    layer = METHODS[name](20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = apply(layer, given)
    assert torch.equal(found.assignment, apply(layer, given).assignment)


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("atc", {"linkage": "ward"}, "linkage = 'ward' must be one of 'average', 'complete', 'single'"),
        ("dpc_knn", {"neighbours": 0}, "neighbours = 0 must be a whole number, at least 1"),
        ("dpc_knn", {"neighbours": 2.5}, "neighbours = 2.5 must be a whole number, at least 1"),
        ("pitome", {"margin": math.inf}, "margin = inf must be a finite number"),
        ("pitome", {"margin": "0.9"}, "margin = '0.9' must be a finite number"),
        ("evit", {"margin": 1}, "'evit': .*unexpected keyword"),
    ],
)
def test_bad_options_are_named(small, method: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tokenpool.patch(small, method, KEEP, **options)


@pytest.mark.parametrize(
    "k, neighbours, message",
    [
        (0, 5, r"k = 0 must be a whole number in 1\.\.4"),
        (5, 5, r"k = 5 must be a whole number in 1\.\.4"),
        (2, 0, "neighbours = 0 must be a whole number, at least 1"),
    ],
)
def test_bad_arguments_of_density_peaks_are_named(k: int, neighbours: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clustering.density_peaks(torch.randn(1, 4, 3), k, neighbours)
