"""What the element-wise rules have in the place of torch.where: the same bits, far quicker on a CPU."""

from __future__ import annotations

import hypothesis.extra.numpy as npst
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dc_merge_peft.linalg import FLOAT32_EPS
from dc_merge_peft.methods.elementwise import SAME, disjoint_merge, keep_from, keep_largest, masked, without_noise
from dc_merge_peft.methods.pcb import tanh_

FLOATS = st.floats(-4, 4, width=32)  # subnormal numbers and both zeros among them
ARRAYS = npst.arrays(np.float32, st.integers(1, 40), elements=FLOATS)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


@DTYPES
@given(values=ARRAYS, place=st.integers(0, 39))
def test_keep_from(dtype: torch.dtype, values: np.ndarray, place: int) -> None:
    """From the threshold on, where that is one of the entries, rounding allowed for, or subnormal."""
    X = torch.from_numpy(values).to(dtype)
    threshold = float(X.abs()[place % len(X)])
    kept = keep_from(X, threshold)
    assert torch.equal(kept, torch.where(X.abs() >= threshold * (1 - SAME), X, 0))
    assert bool((kept[X.abs() >= threshold] == X[X.abs() >= threshold]).all())


@given(values=ARRAYS)
def test_without_noise(values: np.ndarray) -> None:
    """Nothing at the level of rounding stays, all above it does; of zeros there are zeros left."""
    X = torch.from_numpy(values)
    assert torch.equal(without_noise(X), torch.where(X.abs() > FLOAT32_EPS * X.abs().amax(), X, 0))


@given(values=ARRAYS, mask=npst.arrays(np.bool_, 40))
def test_masked(values: np.ndarray, mask: np.ndarray) -> None:
    """A mask of bool or of numbers; there is but one zero, whose sign would be another tensor to whoever hashes it."""
    X, chosen = torch.from_numpy(values), torch.from_numpy(mask)[: len(values)]
    for kind in (chosen, chosen.to(X.dtype)):
        assert torch.equal(masked(X, kind), torch.where(chosen, X, 0))
        assert not bool((masked(X, kind).signbit() & (masked(X, kind) == 0)).any())


@given(
    tasks=npst.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 12)), elements=FLOATS),
    signs=npst.arrays(np.float32, 12, elements=st.sampled_from([-1.0, 0.0, 1.0])),
)
def test_disjoint_merge(tasks: np.ndarray, signs: np.ndarray) -> None:
    """Sums and means of what agrees, entry by entry, in order."""
    X, elected = torch.from_numpy(tasks), torch.from_numpy(signs)[: tasks.shape[1]]
    sums, counts = torch.zeros_like(elected), torch.zeros_like(elected)
    for row in X:
        agreeing = torch.where(row.sign() == elected, row, 0)
        sums += agreeing
        counts += agreeing != 0
    assert torch.equal(disjoint_merge(lambda: X, elected, "sum"), sums)
    assert torch.equal(disjoint_merge(lambda: X, elected, "mean"), sums / counts.clamp(min=1))


def test_equal_entries_are_all_kept() -> None:
    """Down to the smallest number there is."""
    for value in (1.0, 1e-45):
        X = torch.tensor([value, -value, value, 0.0, value / 4])
        assert keep_largest(X, 1).count_nonzero() == 3


def test_tanh() -> None:
    """To the last bits of float64, small, large and zero."""
    sizes = torch.logspace(-300, 300, 5001, dtype=torch.float64)
    X = torch.cat([sizes, -sizes, torch.linspace(-30, 30, 5001, dtype=torch.float64)])
    assert torch.allclose(tanh_(X.clone()), X.tanh(), rtol=1e-15, atol=0)
