"""The Triton kernels for `launch`. Their arguments are pointers and sizes."""

# ruff: noqa: ANN001, ANN201, ANN202 (arguments of kernels are pointers and numbers)
# mypy: disable-error-code="no-untyped-def"

from collections.abc import Callable
from types import SimpleNamespace

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton does not exist for all systems
    triton = None
    tl = SimpleNamespace(constexpr=bool)  # the only name that is used outside the kernels

available = triton is not None


def _jit(*sizes: str) -> Callable:
    """Return `triton.jit` without specialisation on these sizes, because they differ between layers."""
    return triton.jit(do_not_specialize=sizes) if available else lambda function: function


@_jit()
def _rounded_to_tf32(value):
    return ((value.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


INTERPRETED = tl.constexpr(available and not isinstance(_rounded_to_tf32, triton.JITFunction))


@_jit()
def _operand(value):
    """Convert to float32 in Triton's interpreter, which cannot multiply bfloat16. The products are the same."""
    if INTERPRETED:
        value = value.to(tl.float32)
    return value


@_jit("n", "k", "iterations")
def kmedoids_kernel(
    points, weights, assignment, medoids, order, start, scratch, offset,
    n, k, width, iterations, image_stride, row_stride, row_length,
    TOKENS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run K-Medoids, one program for each image.

    The threads exchange values through memory, with a barrier between write and read.
    """
    image = tl.program_id(0).to(tl.int64)
    points += image * image_stride
    weights += image * n
    assignment += image * n
    medoids += image * k
    order += image * n
    start += image * (k + 1)
    offset += image * width
    distance = scratch + image * (n + 2) * row_length
    cost = distance + n * row_length
    length = cost + row_length

    _distances(points, distance, length, offset, n, width, row_stride, row_length, TILE, WIDTH)
    tl.debug_barrier()
    _assign(distance, medoids, assignment, n, k, row_length, TOKENS, ROWS)
    tl.debug_barrier()
    moved = 1
    for _ in range(1, iterations):
        if moved > 0:  # otherwise further iterations change nothing
            _costs(distance, weights, assignment, cost, n, row_length, TOKENS, ROWS)
            tl.debug_barrier()
            moved = _update(weights, assignment, cost, medoids, n, k, TOKENS, ROWS)
            tl.debug_barrier()
            _assign(distance, medoids, assignment, n, k, row_length, TOKENS, ROWS)
            tl.debug_barrier()
    _sort(assignment, order, start, n, k, TOKENS, ROWS)


@_jit()
def _distances(
    points, distance, length, offset, n, width, row_stride, row_length, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute squared distances (n, n) in rows of `row_length`, exactly symmetric and exactly zero on the diagonal.

    Each product of two points is computed once, with the same order of additions in every tile. So two equal points
    have distance zero, and the same distance to any other point.
    """
    inverse = _inverse_scale_and_offset(points, offset, n, width, row_stride, TILE, WIDTH)
    tl.debug_barrier()
    lane = tl.arange(0, TILE)
    blocks = tl.cdiv(n, TILE)
    for step in range(blocks):
        first = blocks - 1 - step  # from the end, because the squared lengths of later points are needed
        row = first * TILE + lane
        product = _products(points, offset, inverse, row, row, n, width, row_stride, TILE, WIDTH)
        row_square = tl.sum(tl.where(lane[:, None] == lane[None, :], product, 0.0), 1)
        tl.store(length + row, row_square, mask=row < n)
        tl.debug_barrier()
        for second in range(first, blocks):
            column = second * TILE + lane
            if second > first:
                product = _products(points, offset, inverse, row, column, n, width, row_stride, TILE, WIDTH)
            column_square = tl.load(length + column, mask=column < n, other=0.0)
            squared = tl.maximum(row_square[:, None] + column_square[None, :] - 2 * product, 0.0)
            upper = (row[:, None] <= column[None, :]) & (column[None, :] < n)
            tl.store(distance + row[:, None] * row_length + column[None, :], squared, mask=upper)
            tl.store(distance + column[None, :] * row_length + row[:, None], squared, mask=upper)


@_jit()
def _inverse_scale_and_offset(points, offset, n, width, row_stride, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Return the inverse of the power of two that scales all values below 2, and write the mean point to `offset`.

    float16 needs no scale, because its squares fit into float32. Only float32 needs centring: products of 16-bit
    numbers are exact in float32, and centring cannot recover the digits that rounding to 16 bits has removed.
    """
    inverse = 1.0
    if points.dtype.element_ty != tl.float16:
        largest = tl.zeros((WIDTH,), tl.float32)
        for first in range(0, width, WIDTH):
            column = first + tl.arange(0, WIDTH)
            total = tl.zeros((WIDTH,), tl.float32)
            for top in range(0, n, TILE):
                row = top + tl.arange(0, TILE)
                inside = (row[:, None] < n) & (column[None, :] < width)
                value = tl.load(points + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
                value = value.to(tl.float32)
                largest = tl.maximum(largest, tl.max(tl.abs(value), 0))
                total += tl.sum(value / 1024, 0)  # cannot overflow
            tl.store(offset + column, total * (1024 / n), mask=column < width)
        exponent = tl.max(largest, 0).to(tl.int32, bitcast=True) >> 23
        exponent = tl.minimum(tl.maximum(exponent, 1), 253)
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return inverse


@_jit()
def _products(points, offset, inverse, row, column, n, width, row_stride, TILE: tl.constexpr, WIDTH: tl.constexpr):
    """Compute the products (TILE, TILE) of the points `row` with the points `column`.

    Tensor cores multiply float32 as TF32, with eleven binary digits. Each number is split into two TF32 numbers. The
    product of the two remainders is omitted, and the other three products are summed (3xTF32 of CUTLASS). Each product
    has a separate sum. So the result is exactly symmetric, which `input_precision="tf32x3"` is not.
    """
    product = tl.zeros((TILE, TILE), tl.float32)
    if points.dtype.element_ty == tl.float32:
        left_rest = tl.zeros((TILE, TILE), tl.float32)
        right_rest = tl.zeros((TILE, TILE), tl.float32)
        for first in range(0, width, WIDTH):
            left = _load_points(points, offset, inverse, row, first, n, width, row_stride, WIDTH)
            right = _load_points(points, offset, inverse, column, first, n, width, row_stride, WIDTH)
            left_high, right_high = _rounded_to_tf32(left), _rounded_to_tf32(right)
            product = tl.dot(left_high, tl.trans(right_high), product, input_precision="tf32")
            left_rest = tl.dot(left - left_high, tl.trans(right_high), left_rest, input_precision="tf32")
            right_rest = tl.dot(left_high, tl.trans(right - right_high), right_rest, input_precision="tf32")
        product += left_rest + right_rest
    else:
        for first in range(0, width, WIDTH):
            left = _load_points(points, offset, inverse, row, first, n, width, row_stride, WIDTH)
            right = _load_points(points, offset, inverse, column, first, n, width, row_stride, WIDTH)
            product = tl.dot(_operand(left), tl.trans(_operand(right)), product)
    return product


@_jit()
def _load_points(points, offset, inverse, row, first, n, width, row_stride, WIDTH: tl.constexpr):
    """Load the columns from `first` on of the points `row`, scaled and centred."""
    column = first + tl.arange(0, WIDTH)
    inside = (row[:, None] < n) & (column[None, :] < width)
    value = tl.load(points + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
    if points.dtype.element_ty == tl.float32:
        value = value * inverse - (tl.load(offset + column, mask=column < width, other=0.0) * inverse)[None, :]
    elif points.dtype.element_ty == tl.bfloat16:
        value = (value.to(tl.float32) * inverse).to(tl.bfloat16)  # exact, because the scale is a power of two
    return value


@_jit()
def _assign(distance, medoids, assignment, n, k, row_length, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Assign each token to the nearest medoid. In a tie the first medoid wins."""
    token = tl.arange(0, TOKENS)
    nearest = tl.full((ROWS, TOKENS), float("inf"), tl.float32)
    index = tl.zeros((ROWS, TOKENS), tl.int32)
    for first in range(0, k, ROWS):
        cluster = first + tl.arange(0, ROWS)
        medoid = tl.load(medoids + cluster, mask=cluster < k, other=0).to(tl.int32)
        inside = (cluster[:, None] < k) & (token[None, :] < n)
        away = tl.load(distance + medoid[:, None] * row_length + token[None, :], mask=inside, other=float("inf"))
        closer = away < nearest
        nearest = tl.where(closer, away, nearest)
        index = tl.where(closer, cluster[:, None], index)
    candidate = tl.where(nearest == tl.min(nearest, 0)[None, :], index, k)
    tl.store(assignment + token, tl.min(candidate, 0).to(tl.int64), mask=token < n)


@_jit()
def _costs(distance, weights, assignment, cost, n, row_length, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Compute the cost of each token as the medoid of its cluster."""
    token = tl.arange(0, TOKENS)
    own = tl.load(assignment + token, mask=token < n, other=-1).to(tl.int32)
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        cluster = tl.load(assignment + row, mask=row < n, other=-2).to(tl.int32)
        weight = tl.load(weights + row, mask=row < n, other=0.0)
        inside = (row[:, None] < n) & (token[None, :] < n)
        away = tl.load(distance + row[:, None] * row_length + token[None, :], mask=inside, other=0.0)
        total += tl.where(cluster[:, None] == own[None, :], weight[:, None] * away, 0.0)
    tl.store(cost + token, tl.sum(total, 0), mask=token < n)


@_jit()
def _update(weights, assignment, cost, medoids, n, k, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Make the member of lowest cost the medoid of each cluster, and return how many medoids moved.

    In a tie the first member wins.
    """
    token = tl.arange(0, TOKENS)
    own = tl.load(assignment + token, mask=token < n, other=-1).to(tl.int32)
    weight = tl.load(weights + token, mask=token < n, other=0.0)
    price = tl.load(cost + token, mask=token < n, other=0.0)
    moved = 0
    for first in range(0, k, ROWS):
        cluster = first + tl.arange(0, ROWS)
        member = cluster[:, None] == own[None, :]
        lowest = tl.min(tl.where(member, price[None, :], float("inf")), 1)
        candidate = tl.where(member & (price[None, :] == lowest[:, None]), token[None, :], n - 1)
        weighs = tl.max(tl.where(member, weight[None, :], 0.0), 1) > 0
        old = tl.load(medoids + cluster, mask=cluster < k, other=0).to(tl.int32)
        new = tl.where(weighs, tl.min(candidate, 1), old)
        moved += tl.sum((new != old).to(tl.int32), 0)
        tl.debug_barrier()  # several threads can have the same medoid, and all must read it before one writes
        tl.store(medoids + cluster, new.to(tl.int64), mask=cluster < k)
    return moved


@_jit()
def _sort(assignment, order, start, n, k, TOKENS: tl.constexpr, ROWS: tl.constexpr):
    """Sort the tokens by cluster. The position of a token is the number of tokens before it."""
    token = tl.arange(0, TOKENS)
    own = tl.load(assignment + token, mask=token < n, other=k).to(tl.int32)
    rank = own * TOKENS + token
    before = tl.zeros((ROWS, TOKENS), tl.int32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        other = tl.load(assignment + row, mask=row < n, other=k).to(tl.int32) * TOKENS + row
        before += (other[:, None] < rank[None, :]).to(tl.int32)
    tl.store(order + tl.sum(before, 0), token, mask=token < n)
    for first in range(0, k + 1, ROWS):
        cluster = first + tl.arange(0, ROWS)
        tl.store(start + cluster, tl.sum((own[None, :] < cluster[:, None]).to(tl.int32), 1), mask=cluster <= k)


@_jit("n", "k")
def means_kernel(
    tokens, share, order, start, out, n, k, width, image_stride, row_stride, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """Compute the mean of each cluster, one program for each cluster of each image and each WIDTH columns."""
    program = tl.program_id(0).to(tl.int64)
    image, cluster = program // k, program % k
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.load(start + image * (k + 1) + cluster)
    end = tl.load(start + image * (k + 1) + cluster + 1)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for place in range(first, end, ROWS):
        member = place + tl.arange(0, ROWS)
        token = tl.load(order + image * n + member, mask=member < end, other=0)
        part = tl.load(share + image * n + token, mask=member < end, other=0.0)
        inside = (member[:, None] < end) & (column[None, :] < width)
        address = tokens + image * image_stride + token[:, None] * row_stride + column[None, :]
        total += part[:, None] * tl.load(address, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + program * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


@_jit("n", "k")
def weighted_means_kernel(
    tokens, weights, order, start, previous, out, n, k, width, image_stride, row_stride,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Like `means_kernel`, but it computes the shares from weights. A cluster of weight zero gets token `previous`."""
    program = tl.program_id(0).to(tl.int64)
    image, cluster = program // k, program % k
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    first = tl.load(start + image * (k + 1) + cluster)
    end = tl.load(start + image * (k + 1) + cluster + 1)
    parts = tl.zeros((ROWS,), tl.float32)
    for place in range(first, end, ROWS):
        member = place + tl.arange(0, ROWS)
        token = tl.load(order + image * n + member, mask=member < end, other=0)
        parts += tl.load(weights + image * n + token, mask=member < end, other=0.0)
    weight = tl.sum(parts, 0)
    divisor = tl.where(weight > 0, weight, 1.0)
    total = tl.zeros((ROWS, WIDTH), tl.float32)
    for place in range(first, end, ROWS):
        member = place + tl.arange(0, ROWS)
        token = tl.load(order + image * n + member, mask=member < end, other=0)
        part = tl.load(weights + image * n + token, mask=member < end, other=0.0)
        inside = (member[:, None] < end) & (column[None, :] < width)
        address = tokens + image * image_stride + token[:, None] * row_stride + column[None, :]
        value = tl.load(address, mask=inside, other=0.0).to(tl.float32)
        total += tl.div_rn(part, tl.zeros_like(part) + divisor)[:, None] * value
    kept = tl.load(previous + program).to(tl.int32)
    address = tokens + image * image_stride + kept * row_stride + column
    old = tl.load(address, mask=column < tl.where(weight > 0, 0, width), other=0.0)  # not read without need
    mean = tl.sum(total, 0).to(out.dtype.element_ty)
    tl.store(out + program * width + column, tl.where(weight > 0, mean, old), mask=column < width)


@_jit("n", "heads")
def attention_kernel(
    q, k, v, bias, out, received, scale, heads, n, width,
    q_image, q_head, q_row, k_image, k_head, k_row, v_image, v_head, v_row,
    ROWS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_OUTPUT: tl.constexpr,
):  # fmt: skip
    """Compute attention, one program for each head of each image. It loops over blocks of queries, with all keys."""
    program = tl.program_id(0).to(tl.int64)
    image, head = program // heads, program % heads
    key, column = tl.arange(0, KEYS), tl.arange(0, WIDTH)
    real = (key[:, None] < n) & (column[None, :] < width)
    address = k + image * k_image + head * k_head + key[:, None] * k_row + column[None, :]
    keys = _operand(tl.load(address, mask=real, other=0.0))
    if WITH_OUTPUT:
        address = v + image * v_image + head * v_head + key[:, None] * v_row + column[None, :]
        values = _operand(tl.load(address, mask=real, other=0.0))
    log2_e: tl.constexpr = 1.4426950408889634  # exp(x) = exp2(x log2(e)), and GPUs compute exp2
    added = tl.where(key < n, 0.0, float("-inf"))
    if WITH_BIAS:
        added += tl.load(bias + image * n + key, mask=key < n, other=0.0) * log2_e
    total = tl.zeros((ROWS, KEYS), tl.float32)
    for first in range(0, n, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < n) & (column[None, :] < width)
        source = q + image * q_image + head * q_head + row[:, None] * q_row + column[None, :]
        queries = _operand(tl.load(source, mask=inside, other=0.0))
        logits = tl.dot(queries, tl.trans(keys), input_precision="tf32x3") * (scale * log2_e) + added[None, :]
        weight = tl.exp2(logits - tl.max(logits, 1)[:, None])
        inverse = 1 / tl.sum(weight, 1)
        total += weight * tl.where(row < n, inverse, 0.0)[:, None]
        if WITH_OUTPUT:
            rounded = _operand(weight.to(v.dtype.element_ty))
            result = tl.dot(rounded, values, input_precision="tf32x3") * inverse[:, None]
            target = out + ((image * n + row[:, None]) * heads + head) * width + column[None, :]
            tl.store(target, result.to(out.dtype.element_ty), mask=inside)
    tl.store(received + program * n + key, tl.sum(total, 0), mask=key < n)
