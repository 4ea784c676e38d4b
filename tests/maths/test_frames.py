"""The two passes over a stack of tall factors, in every layout, dtype and size that they meet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dc_merge_peft.frames import ROWS, SCRATCH, Stack, orthonormal_frame
from dc_merge_peft.layout import Layout

from ..support.strategies import relative

SIZES = [(1, 1), (5, 3), (ROWS - 1, 4), (ROWS, 2), (2 * ROWS + 7, 5)]


def parts(m: int, ranks: tuple[int, ...], along: bool, dtypes: tuple[torch.dtype, ...]) -> tuple[Tensor, ...]:
    """Random factors (m, r_i), stored along their columns, as A^T is, or along their rows, as B is."""
    generator = torch.Generator().manual_seed(m + sum(ranks))
    made = (torch.randn((r, m) if along else (m, r), generator=generator).to(d) for r, d in zip(ranks, dtypes))
    return tuple(X.mT if along else X for X in made)


@pytest.mark.parametrize(("m", "r"), SIZES)
@pytest.mark.parametrize("along", [False, True])
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_gram_and_product(m: int, r: int, along: bool, dtypes: tuple[torch.dtype, ...]) -> None:
    """Both passes against the plain products in float64, twice in a row, since memory is used again."""
    stack = Stack(parts(m, (r, 2), along, dtypes))
    X = torch.cat([part.double() for part in stack.parts], dim=1)
    coefficients = torch.randn(r + 2, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for _ in range(2):
        assert relative(stack.gram(), X.mT @ X) <= 1e-13
        assert relative(stack.times(coefficients), X @ coefficients) <= 1e-7
        assert relative(stack.times(coefficients.float(), scale=-0.5), -0.5 * X @ coefficients) <= 1e-6
        half = stack.times(coefficients, torch.bfloat16, scale=3.0)
        assert half.dtype == torch.bfloat16 and torch.equal(half, (stack.times(coefficients) * 3.0).bfloat16())
    assert m == 1 or (stack.times(coefficients).stride(0) == 1) == along
    SCRATCH.forget()


def test_results_do_not_share_memory() -> None:
    """What one product gives is not changed by the next one."""
    stack = Stack(parts(ROWS + 3, (2, 3), False, (torch.float32, torch.float32)))
    first = stack.times(torch.eye(5))
    kept = first.clone()
    stack.times(2 * torch.eye(5))
    stack.gram()
    assert torch.equal(first, kept)


def test_float32_products_only_where_they_are_as_good() -> None:
    """Orthogonal columns are multiplied in float32, columns that lean on each other and float64 input in float64."""
    X = torch.linalg.qr(torch.randn(50, 6, generator=torch.Generator().manual_seed(2)))[0]
    leaning = X + 100 * X[:, :1]
    assert orthonormal_frame(X).dtype == torch.float32
    assert orthonormal_frame(leaning).dtype == torch.float64
    assert orthonormal_frame(X.double()).dtype == torch.float64
    for stack in (X, leaning):
        frame = orthonormal_frame(stack)
        Q = frame.expand(torch.eye(6, dtype=torch.float64)).double()
        assert relative(Q.mT @ Q, torch.eye(6)) <= 1e-6


@pytest.mark.parametrize("scaling", [1.0, 2.0, 0.25, -4.0, 1.5, 0.7, 0.0])
def test_scaling_of_bfloat16_is_exact(scaling: float) -> None:
    """A scaling goes into B in its own dtype only where that rounds nothing."""
    B = torch.randn(7, 3, generator=torch.Generator().manual_seed(3)).bfloat16()
    delta = Layout().to_lowrank(torch.eye(3).bfloat16(), B, scaling)
    assert torch.equal(delta.B.double(), (B.float() * scaling).double())
    power = scaling in (1.0, 2.0, 0.25, -4.0)
    assert delta.B.dtype == (torch.bfloat16 if power else torch.float32)
    half = Layout().to_lowrank(torch.eye(3).half(), B.half(), scaling)
    assert half.B.dtype == torch.float32, "float16 has too little range to multiply in"
