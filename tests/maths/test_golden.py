"""Golden data: the numbers that the original authors' published code gives (``tests/golden/README.md``)."""

from __future__ import annotations

import pytest

from dc_merge_peft.engine import merge_module
from dc_merge_peft.lowrank import SharedSpace
from dc_merge_peft.methods import Method, method_named
from tests.support.golden import FILES, KEYS, golden_cases, golden_file
from tests.support.strategies import relative

# The expectations are float32 results of float32 SVDs. 5e-6 is what was measured at most; a wrong entry of TIES, a
# wrong rho or a missing direction costs 1e-2 and more.
TOLERANCE = 1e-5

CASES = [
    pytest.param(file, key, module, id=f"{file}-{key}-{module}")
    for file, key in golden_cases()
    for module in golden_file(file).modules
]


def method_of(file: str, key: str) -> Method:
    """The method and options behind a key."""
    return method_named(*golden_file(file).options(key))


@pytest.mark.parametrize("file", FILES)
def test_every_expectation_is_used(file: str) -> None:
    """No key of a file is left out of the comparison below."""
    found = {key for key in golden_file(file).tensors if key.startswith("expected.")}
    assert found == {f"expected.{key}.{module}" for key in KEYS for module in golden_file(file).modules}


@pytest.mark.parametrize(("file", "key", "module"), CASES)
def test_method_on_shared_cores(file: str, key: str, module: str) -> None:
    """The method on the cores of the shared space, expanded by the orthonormal frames."""
    tasks = golden_file(file).lowranks(module)
    space = SharedSpace.of(tasks)
    merged = space.expand(method_of(file, key).merge(space.cores, [1.0] * len(tasks)))
    assert relative(merged.dense(), golden_file(file).expected(key)[module]) <= TOLERANCE


@pytest.mark.parametrize(("file", "key", "module"), CASES)
def test_engine(file: str, key: str, module: str) -> None:
    """One module through the engine: shared space, method, balanced factors."""
    tasks = golden_file(file).lowranks(module)
    delta, S, _ = merge_module(method_of(file, key), tasks, [1.0] * len(tasks), None)
    assert relative(delta.dense(), golden_file(file).expected(key)[module]) <= TOLERANCE
    assert delta.rank == len(S) <= sum(task.rank for task in tasks)


@pytest.mark.parametrize("module", golden_file("lora_8x16").modules)
def test_auto_density_is_the_papers_where_the_paper_ran(module: str) -> None:
    """At eight tasks of rank 16, ``density="auto"`` keeps the same 16 entries a task as the paper's 0.001."""
    tasks = golden_file("lora_8x16").lowranks(module)
    delta, _, _ = merge_module(method_named("dc", {"smoothing": "average"}), tasks, [1.0] * len(tasks), None)
    assert relative(delta.dense(), golden_file("lora_8x16").expected("dc_avg")[module]) <= TOLERANCE
