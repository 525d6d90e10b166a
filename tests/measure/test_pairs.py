"""Pairs counted from counts, against loops over every pair."""

import itertools

import pytest
import torch

from pipeline.measure.operations import Convolution, batches, is_even, matrices


def sparse(*shape: int, seed: int = 0) -> torch.Tensor:
    """Integers, a third of them 0."""
    return torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).double()


def met(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[int, int]:
    """Of all pairs, those without a 0; and all."""
    return sum(bool(a != 0) and bool(b != 0) for a, b in pairs), len(pairs)


def test_matrices() -> None:
    a, b = sparse(4, 5), sparse(5, 3, seed=1)
    every = [(a[n, i], b[i, o]) for n, i, o in itertools.product(range(4), range(5), range(3))]
    assert matrices(a, b) == met(every)
    assert 0 < matrices(a, b).live < matrices(a, b).all == 60


def test_batches() -> None:
    a, b = sparse(2, 4, 5), sparse(2, 5, 3, seed=1)
    every = [
        (a[m, n, i], b[m, i, o])
        for m, n, i, o in itertools.product(range(2), range(4), range(5), range(3))
    ]
    assert batches(a, b) == met(every)


def test_more_rows_than_a_float_counts() -> None:
    rows = 2**24 + 3  # the next float is 2^24 + 4
    assert matrices(torch.ones(rows, 1), torch.ones(1, 1)) == (rows, rows)


@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"),
    [(1, 1, 1, 1), (2, 1, 1, 2), (1, 0, 2, 1), (3, 2, 1, 4), (2, 0, 1, 1)],
)
def test_the_three_products_of_a_convolution(
    stride: int, padding: int, dilation: int, groups: int
) -> None:
    x, weight = sparse(2, 4, 7, 6), sparse(8, 4 // groups, 3, 2, seed=1)
    places = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation, groups).shape[
        2:
    ]
    g = sparse(2, 8, *places, seed=2)
    reads = []  # (output, input, weight) of every pair inside the image
    for n, o, p, q, c, h, w in itertools.product(*map(range, (2, 8, *places, 4 // groups, 3, 2))):
        row, column = p * stride + h * dilation - padding, q * stride + w * dilation - padding
        if 0 <= row < 7 and 0 <= column < 6:
            channel = o // (8 // groups) * (4 // groups) + c
            reads.append((g[n, o, p, q], x[n, channel, row, column], weight[o, c, h, w]))
    convolution = Convolution((3, 2), [stride] * 2, [padding] * 2, [dilation] * 2, groups)
    assert convolution.forward(x, weight, tuple(places)) == met([(x, w) for _, x, w in reads])
    assert convolution.error(g, weight, (7, 6)) == met([(g, w) for g, _, w in reads])
    assert convolution.weights(g, x) == met([(g, x) for g, x, _ in reads])


def test_even_is_one_magnitude_in_each_row() -> None:
    assert is_even(torch.tensor([[0.0, 1.0, 1.0], [-0.3, 0.3, 0.0]]))
    assert not is_even(torch.tensor([[0.0, 1.0, 2.0], [0.3, 0.3, 0.0]]))
    assert is_even(torch.zeros(2, 0)) and is_even(torch.zeros(2, 3))
    assert is_even(torch.tensor([[1.0], [-1.0], [0.0]])) and not is_even(
        torch.tensor([[2.0], [1.0]])
    )


@pytest.mark.parametrize("where", [0, 1500, 9999])
@pytest.mark.parametrize("rows", [1, 4, 10_000])
def test_one_number_among_many_is_enough_not_to_be_even(rows: int, where: int) -> None:
    x_OI = torch.arange(10_000.0).remainder(2).reshape(rows, -1)
    assert is_even(x_OI)
    x_OI.flatten()[where] = 0.5
    assert not is_even(x_OI)
