"""The kernels against their plain counterparts: on a GPU where there is one, else in Triton's interpreter."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from tokenpool import clustering, gpu, micro_batch
from tokenpool.clustering import Clusters, squared_distances, stable_topk
from tokenpool.clustering.reductions import weighted_means

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Around the powers of two that blocks have, and a vision transformer's. Triton's interpreter is slow with many tokens.
LARGE = [196, 197, 256, 257]
SIZES = [1, 2, 7, 33, 64, 65, *(n if DEVICE == "cuda" else pytest.param(n, marks=pytest.mark.slow) for n in LARGE)]
DTYPE = pytest.mark.parametrize("dtype", gpu.DTYPES, ids=str)

runs = pytest.mark.usefixtures("triton_runs")


@pytest.fixture
def chosen() -> Iterator[None]:
    with gpu.using("triton"):
        yield


# Small integers, whose mean is zero: every distance and every cost is exact, and ties are ties for both.
def whole(batch: int, n: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens, many of which are equal, and weights, a third of which are zero."""
    generator = torch.Generator().manual_seed(seed)
    half = torch.randint(-3, 4, (batch, n // 2, width), generator=generator)
    tokens = torch.cat([half, -half, half.new_zeros(batch, n % 2, width)], 1)
    tokens = tokens[:, torch.randperm(n, generator=generator)]
    weights = torch.tensor([0, 0, 1, 2, 3, 4])[torch.randint(6, (batch, n), generator=generator)].float()
    weights[:, 0] = 4
    return tokens.to(DEVICE, dtype), weights.to(DEVICE)


def random(batch: int, n: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens, weights = torch.randn(batch, n, width, generator=generator), torch.rand(batch, n, generator=generator)
    weights = weights / weights.amax(1, keepdim=True)
    return tokens.to(DEVICE, dtype), weights.to(DEVICE)


def kmedoids(tokens: Tensor, k: int, weights: Tensor, iterations: int = 5) -> tuple[gpu.Medoids, Clusters]:
    """What the kernel finds, and what the plain function does."""
    weights = weights / weights.amax(1, keepdim=True)
    medoids = stable_topk(weights, k)
    with gpu.using("plain"):
        plain = clustering.kmedoids(tokens, k, weights, medoids, iterations)
    return gpu.kmedoids(tokens, weights, medoids, iterations), plain


def objective(tokens: Tensor, weights: Tensor, assignment: Tensor) -> Tensor:
    """Objective (13) of the best medoids: (B,)."""
    same = assignment[:, :, None] == assignment[:, None, :]  # (B, N, N)
    cost = (squared_distances(tokens.double()) * weights[:, None, :] * same).sum(-1)  # (B, N)
    best = cost.new_full(cost.shape, torch.inf).scatter_reduce(1, assignment, cost, "amin")
    return best.nan_to_num(posinf=0).sum(-1)


@runs
@pytest.mark.parametrize("n", SIZES)
def test_kmedoids_equals_the_plain_one_to_the_last_tie(n: int) -> None:
    sizes = (n, 1, n // 2) if n in (7, 33) else (n // 3, n // 2, n // 5)
    for seed, (dtype, k) in enumerate(zip(gpu.DTYPES, sizes, strict=True)):
        tokens, weights = whole(2, n, 5, dtype, seed)
        found, plain = kmedoids(tokens, max(k, 1), weights)
        assert torch.equal(found.assignment, plain.assignment), (dtype, k)
        medoids = found.previous[:, :, None].expand(-1, -1, n)
        nearest = squared_distances(tokens.float()).gather(1, medoids).min(1).indices
        assert torch.equal(found.assignment, nearest)


@runs
@DTYPE
@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_kmedoids_stops_where_the_plain_one_does(dtype: torch.dtype, iterations: int) -> None:
    for seed in range(2):
        tokens, weights = whole(2, 30, 3, dtype, seed)
        found, plain = kmedoids(tokens, 9, weights, iterations)
        assert torch.equal(found.assignment, plain.assignment)


@runs
@DTYPE
@pytest.mark.parametrize("n, k, width", [(40, 12, 200), (70, 35, 64)])
def test_kmedoids_is_as_good_where_numbers_are_rounded(dtype: torch.dtype, n: int, k: int, width: int) -> None:
    tokens, weights = random(2, n, width, dtype)
    found, plain = kmedoids(tokens, k, weights)
    assert (found.assignment == plain.assignment).float().mean() > 0.99
    torch.testing.assert_close(
        objective(tokens, weights, found.assignment), objective(tokens, weights, plain.assignment), rtol=1e-5, atol=0
    )


@runs
def test_float32_has_more_digits_than_a_tensor_core() -> None:
    """Odd numbers of twelve binary digits lie between even ones, which come from the largest down."""
    odd, even = torch.arange(2049, 2300, 2), torch.arange(2300, 2044, -4)
    points = torch.cat([odd, even, -even, -odd]).to(DEVICE)
    medoids = torch.arange(len(odd), len(odd) + 2 * len(even), device=DEVICE)
    weights = torch.ones(1, len(points), device=DEVICE)
    found = gpu.kmedoids(points[None, :, None].float(), weights, medoids[None], 1)
    nearest = (points[:, None] - points[medoids]).abs().min(1).indices
    assert torch.equal(found.assignment[0], nearest)


@runs
@DTYPE
def test_clusters_without_weight_keep_their_medoid(dtype: torch.dtype) -> None:
    tokens = torch.tensor([[[0], [1], [10], [11], [12], [-34]]], device=DEVICE, dtype=dtype)
    weights = torch.tensor([[1.0, 1, 0, 0, 0, 1]], device=DEVICE)
    # The third cluster starts at the middle of its members, at no cost to any: not the first, but the old one stays.
    # The fourth starts at the same token and has no members at all.
    medoids = torch.tensor([[1, 5, 3, 3]], device=DEVICE)
    found = gpu.kmedoids(tokens, weights, medoids, 5)
    assert found.previous.tolist() == [[0, 5, 3, 3]]
    assert found.assignment.tolist() == [[0, 0, 2, 2, 2, 1]]
    assert found.start.tolist() == [[0, 2, 3, 6, 6]]


@runs
@DTYPE
def test_equal_tokens_share_a_cluster(dtype: torch.dtype) -> None:
    """Also where numbers are rounded: their distances to others are the same to the last bit."""
    tokens, weights = random(2, 45, 70, dtype)
    tokens = torch.cat([tokens, tokens[:, :30]], 1) + 0.3
    weights = torch.cat([weights, weights[:, :30]], 1)
    medoids = torch.arange(0, 75, 2, device=DEVICE).expand(2, -1)
    for iterations in (1, 3):
        found = gpu.kmedoids(tokens, weights, medoids, iterations)
        assert torch.equal(found.assignment[:, :30], found.assignment[:, 45:])


@runs
@pytest.mark.parametrize("factor", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scale_is_irrelevant(dtype: torch.dtype, factor: float) -> None:
    tokens, weights = random(2, 50, 20, dtype)
    power = 2.0 ** round(torch.tensor(factor).log2().item())
    found, plain = kmedoids(tokens * power, 11, weights)
    assert torch.equal(found.assignment, plain.assignment)


@runs
def test_a_common_offset_is_irrelevant() -> None:
    tokens, weights = random(2, 50, 20, torch.float32)
    tokens = (tokens * 64).round() / 64  # lest the offset round them
    found, _ = kmedoids(tokens, 11, weights)
    moved, _ = kmedoids(tokens + 2000, 11, weights)
    assert torch.equal(found.assignment, moved.assignment)


@runs
@DTYPE
def test_kmedoids_reads_with_strides(dtype: torch.dtype) -> None:
    tokens, weights = whole(2, 20, 24, dtype)
    expected = gpu.kmedoids(tokens, weights / 4, stable_topk(weights, 9), 4)
    medoids = stable_topk(weights, 9).mT.contiguous().mT
    wide = tokens.new_full((2, 22, 50), torch.nan)
    wide[:, 1:21, 7:31] = tokens
    transposed = tokens.mT.contiguous().mT
    by_row = tokens.transpose(0, 1).contiguous().transpose(0, 1)
    for values in (wide[:, 1:21, 7:31], transposed, by_row):
        found = gpu.kmedoids(values, weights / 4, medoids, 4)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@runs
def test_an_image_depends_neither_on_its_batch_nor_on_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, weights = random(5, 40, 30, torch.float32)
    medoids = stable_topk(weights, 12)
    together = gpu.kmedoids(tokens, weights, medoids, 5)
    for image in range(5):
        one = slice(image, image + 1)
        alone = gpu.kmedoids(tokens[one], weights[one], medoids[one], 5)
        assert all(torch.equal(part, all_[one]) for part, all_ in zip(alone, together, strict=True))
    monkeypatch.setattr(micro_batch, "DISTANCES", micro_batch.Budget(1, 2 * 40 * 48))
    assert all(map(torch.equal, gpu.kmedoids(tokens, weights, medoids, 5), together))


@runs
def test_values_that_are_not_finite_do_no_harm() -> None:
    tokens, weights = random(2, 20, 6, torch.float32)
    tokens[0, 3] = torch.nan
    tokens[0, 5] = torch.inf
    found = gpu.kmedoids(tokens, weights, stable_topk(weights, 5), 5)
    assert found.assignment.min() >= 0 and found.assignment.max() < 5
    assert found.previous.min() >= 0 and found.previous.max() < 20


@runs
@pytest.mark.parametrize("n, k", [(1, 1), (7, 7), (65, 20)])
def test_order_and_start(n: int, k: int) -> None:
    tokens, weights = whole(2, n, 3, torch.float32)
    found, _ = kmedoids(tokens, k, weights)
    assert torch.equal(found.order.long(), found.assignment.argsort(stable=True))
    counts = torch.stack([torch.bincount(row, minlength=k) for row in found.assignment])
    assert torch.equal(found.start[:, 1:].long(), counts.cumsum(1)) and not found.start[:, 0].any()


@runs
@pytest.mark.slow
def test_the_largest_size() -> None:
    tokens, weights = whole(1, gpu.MAX_POINTS, 3, torch.float32)
    found, plain = kmedoids(tokens, 5, weights, iterations=2)
    assert torch.equal(found.assignment, plain.assignment)


def shares(weights: Tensor, assignment: Tensor, k: int) -> Tensor:
    total = clustering.sums(weights, assignment, k)
    return weights / torch.where(total > 0, total, 1).gather(1, assignment)


@runs
@DTYPE
@pytest.mark.parametrize("n, k, width", [(1, 1, 1), (30, 30, 40), (9, 2, 513)])
def test_means(dtype: torch.dtype, n: int, k: int, width: int) -> None:
    tokens, weights = random(2, n, width, dtype)
    found, _ = kmedoids(tokens, k, weights)
    share = shares(weights, found.assignment, k)
    wide = torch.cat([tokens, tokens], 2)[:, :, width:].requires_grad_()
    leaf = tokens.clone().requires_grad_()
    result = gpu.means(wide, share, found.assignment, found.order, found.start)
    expected = torch.zeros(2, k, n, device=DEVICE).scatter(1, found.assignment[:, None], share[:, None]) @ leaf.float()
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-5)
    gradient = torch.randn_like(expected)
    result.backward(gradient.to(dtype))
    expected.backward(gradient)
    torch.testing.assert_close(wide.grad, leaf.grad, rtol=2e-2, atol=1e-2 if dtype != torch.float32 else 1e-6)


@runs
def test_the_mean_of_no_members_is_zero() -> None:
    tokens, weights = random(1, 4, 5, torch.float32)
    found = gpu.kmedoids(torch.zeros_like(tokens), weights, torch.tensor([[2, 1]], device=DEVICE), 3)
    share = shares(weights, found.assignment, 2)
    centers = gpu.means(tokens, share, found.assignment, found.order, found.start)
    assert not centers[0, 1].any() and centers[0, 0].all()


@runs
@DTYPE
@pytest.mark.parametrize("n, k, width", [(1, 1, 1), (30, 30, 40), (33, 5, 513)])
def test_weighted_means_in_one_launch_equal_those_in_many(dtype: torch.dtype, n: int, k: int, width: int) -> None:
    tokens, weights = random(2, n, width, dtype)
    weights[:, n // 2 :] = weights[:, n // 2 :] * 1e-38 if n == 33 else 0  # some clusters weigh little, or nothing
    weights[:, 0] = 1
    found, _ = kmedoids(tokens, k, weights)
    wide = torch.cat([tokens, tokens], 2)[:, :, width:]
    result = gpu.weighted_means(wide, weights, found)
    several = weighted_means(wide.clone().requires_grad_(), weights, found.assignment, found.previous, found[2:])
    assert several.requires_grad and result.dtype == dtype
    torch.testing.assert_close(result, several.detach(), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)
    one = weighted_means(wide, weights, found.assignment, found.previous, found[2:])
    assert torch.equal(one, result)


def heads(batch: int, count: int, n: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as views into one tensor, as a linear layer gives them."""
    qkv = torch.randn(batch, n, 3, count, width, generator=torch.Generator().manual_seed(n)) * 2
    return qkv.to(DEVICE, dtype).permute(2, 0, 3, 1, 4).unbind(0)


def explicit(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    logits = q.double() @ k.double().mT * scale
    matrix = (logits if bias is None else logits + bias[:, None, None, :].double()).softmax(-1)
    return matrix @ v.double(), matrix.sum((1, 2))


def biases(batch: int, n: int) -> Tensor:
    sizes = torch.randint(1, 9, (batch, n), generator=torch.Generator().manual_seed(n))
    sizes[:, 1::5] = 0
    return sizes.log().to(DEVICE)


ROUNDING = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@runs
@DTYPE
@pytest.mark.parametrize("n", SIZES)
def test_attention(dtype: torch.dtype, n: int, chosen: None) -> None:
    q, k, v = heads(2, 3, n, 64 if n % 2 else 24, dtype)
    if not gpu.attention_fits(q, k, v):  # the numbers of 257 keys in float32 take more memory than an H100 has
        assert (dtype, n) == (torch.float32, 257)
        q, k, v = heads(2, 3, n, 32, dtype)
        assert gpu.attention_fits(q, k, v)
    bias = biases(2, n) if n % 3 else None
    expected, scores = explicit(q, k, v, bias, 0.2)
    out, received = gpu.attention(q, k, v, bias, 0.2)
    assert out.shape == expected.shape and out.dtype == dtype and received.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=ROUNDING[dtype] * expected.abs().max().item())
    torch.testing.assert_close(received.double(), scores, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gpu.received(q, k, bias, 0.2), received, rtol=1e-6, atol=1e-6)


@runs
@pytest.mark.parametrize("width", [1, 16, 32, 80, 128])
def test_attention_of_any_width(width: int) -> None:
    q, k, v = heads(1, 2, 40, width, torch.float16)
    expected, scores = explicit(q, k, v, None, width**-0.5)
    out, received = gpu.attention(q, k, v, None, width**-0.5)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-3 * expected.abs().max().item())
    torch.testing.assert_close(received.double(), scores, rtol=1e-5, atol=1e-5)


@runs
@pytest.mark.slow
def test_attention_over_the_most_keys_reads_with_strides() -> None:
    q, k, v = heads(2, 2, gpu.MAX_KEYS, 32, torch.float16)
    expected, scores = explicit(q, k, v, None, 0.1)
    padded = q.new_full((3, 2, 600, 70), torch.nan)[1:, :, 3:515, 5:37]
    padded.copy_(v)
    out, received = gpu.attention(q.contiguous(), k, padded, None, 0.1)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=4e-3)
    torch.testing.assert_close(received.double(), scores, rtol=1e-5, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()
    found = gpu.attention(q.mT.contiguous().mT, k.mT.contiguous().mT, v.mT.contiguous().mT, None, 0.1)
    assert torch.equal(found[0], out) and torch.equal(found[1], received)


@runs
def test_large_logits() -> None:
    q, k, v = heads(1, 1, 20, 16, torch.float32)
    expected, scores = explicit(q, k, v, None, 300.0)
    out, received = gpu.attention(q, k, v, None, 300.0)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(received.double(), scores, rtol=0, atol=1e-2)


@runs
def test_an_empty_batch() -> None:
    q, k, v = heads(0, 2, 5, 16, torch.float16)
    out, received = gpu.attention(q, k, v, None, 1.0)
    assert out.shape == (0, 2, 5, 16) and received.shape == (0, 5)
    found = gpu.kmedoids(q[:, 0], received, received.long()[:, :2], 3)
    assert found.assignment.shape == (0, 5) and found.start.shape == (0, 3)
    assert gpu.means(q[:, 0], received, found.assignment, found.order, found.start).shape == (0, 2, 16)


@runs
@pytest.mark.slow
def test_what_torch_is_told_of_them() -> None:
    tokens, weights = random(2, 9, 6, torch.float32)
    medoids = stable_topk(weights, 3)
    torch.library.opcheck(torch.ops.tokenpool.kmedoids, (tokens, weights, medoids, 2))
    found = gpu.kmedoids(tokens, weights, medoids, 2)
    leaf = tokens[:, :, 1:].clone().requires_grad_()
    torch.library.opcheck(torch.ops.tokenpool.means, (leaf, weights, found.assignment, found.order, found.start))
    torch.library.opcheck(torch.ops.tokenpool.weighted_means, (tokens, weights, *found[2:], found.previous))
    q, k, v = heads(2, 2, 9, 16, torch.float16)
    for bias in (None, biases(2, 9)):
        torch.library.opcheck(torch.ops.tokenpool.attention, (q, k, v, bias, 0.5))
        torch.library.opcheck(torch.ops.tokenpool.received, (q, k, bias, 0.5))


def pooled(tokens: Tensor, weights: Tensor, medoids: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Both kinds of kernels, where they fit."""
    q, k, v = qkv.unbind(2)
    if not gpu.kmedoids_fits(tokens) or not gpu.attention_fits(q, k, v):
        return tokens, qkv
    found = gpu.kmedoids(tokens, weights, medoids, 3)
    share = shares(weights, found.assignment, medoids.shape[1])
    centers = gpu.means(tokens, share, found.assignment, found.order, found.start)
    return centers, gpu.attention(q, k, v, weights, 0.3)[0]


@runs
@pytest.mark.slow
def test_compiled_without_a_break_and_anew_for_another_choice(chosen: None) -> None:
    tokens, weights = random(2, 21, 6, torch.float32)
    qkv = torch.stack(heads(2, 2, 21, 16, torch.float16), 2)
    compiled = torch.compile(pooled, fullgraph=True)
    arguments = (tokens.requires_grad_(), weights, stable_topk(weights, 4), qkv)
    found, expected = compiled(*arguments), pooled(*arguments)
    assert found[0].shape == (2, 4, 6)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(result[0].square().sum(), tokens) for result in (found, expected)]
    torch.testing.assert_close(*gradients)
    with gpu.using("plain"):
        assert compiled(*arguments)[0].shape == tokens.shape
    assert compiled(*arguments)[0].shape == (2, 4, 6)
