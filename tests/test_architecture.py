"""The shape of the package: which module may know which, what the mathematics may import, sizes and public names.

Imports are read from the sources, those inside functions and under ``TYPE_CHECKING`` included, so that nothing is run.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from graphlib import TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import dc_merge_peft

ROOT = Path(__file__).parent.parent
PACKAGE = "dc_merge_peft"

# From the bottom up; a module may import from its own layer and those below. A name with ".*" is a whole subpackage.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "_version", "paths", "progress", "startup"),
    ("hub_errors", "markup", "memory", "shown", "sizes", "yaml_files"),
    ("linalg", "frames"),
    ("lowrank", "dense", "filed_dense", "spanned", "stacked"),
    ("layout", "methods.*"),
    ("metrics.*",),
    ("layers", "own_forward", "offload", "sources.*"),
    ("statistics.*",),
    (
        "extras",
        "extra_values",
        "padding",
        "plan",
        "together",
        "full_plan",
        "result",
        "completion",
        "reading",
        "engine",
        "one_module",
        "batching",
        "parallel",
        "budget",
        "work.*",
        "runconfig",
        "combination_types",
    ),
    ("outputs.*",),
    ("inspection.*",),
    ("plots.*",),
    ("report.*",),
    ("merged", "merging", "fusing", "fused_models", "full_models", "adapter", "peft_plugin"),
    ("registration",),
    ("tuning.*",),
    ("",),  # the package itself: its public names
    ("demo.*",),
    ("cli.*",),
    ("__main__",),
)
# The mathematics: torch, the standard library and itself.
MATHEMATICS = (
    "errors",
    "linalg",
    "frames",
    "lowrank",
    "dense",
    "spanned",
    "stacked",
    "layout",
    "methods.*",
    "metrics.*",
)
# Slow to import, or optional: nothing that ``import dc_merge_peft`` runs may import them at once.
LATE = {"peft", "accelerate", "transformers", "huggingface_hub", "matplotlib", "optuna", "typer", "rich"}


def matches(module: str, pattern: str) -> bool:
    """Whether a module (without the package's name) belongs to a pattern of the tables above."""
    stem = pattern.removesuffix(".*")
    return module == stem or (pattern.endswith(".*") and module.startswith(stem + "."))


@lru_cache
def sources() -> dict[str, Path]:
    """Every module by its name without the package's; the package itself is the empty name."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def absolute_imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """Dotted names that import statements bring in; ``from a import b`` as ``a.b``, which may be a module or not."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the arrows"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: nothing inside functions or under ``TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        if not lazy and not checking:
            yield child
            yield from at_import_time(child)


@lru_cache
def imports(module: str, *, all_of_them: bool = True) -> frozenset[str]:
    """What a module imports: anywhere, or when it is imported itself."""
    tree = ast.parse(sources()[module].read_text(encoding="utf-8"))
    return frozenset(absolute_imports(ast.walk(tree) if all_of_them else at_import_time(tree)))


def internal(names: frozenset[str]) -> set[str]:
    """Modules of this package among imported names."""
    found = set()
    for name in names:
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            inner = name.removeprefix(PACKAGE).removeprefix(".")
            found.add(inner if inner in sources() else inner.rpartition(".")[0])
    return found


def external(names: frozenset[str]) -> set[str]:
    """Packages of others among imported names."""
    return {name.partition(".")[0] for name in names} - {PACKAGE} - set(sys.stdlib_module_names)


def layer(module: str) -> int:
    """The layer of a module; every module must have exactly one."""
    found = [index for index, patterns in enumerate(LAYERS) for pattern in patterns if matches(module, pattern)]
    assert len(found) == 1, f"'{module}' has {len(found)} layers: give each new module one place in LAYERS"
    return found[0]


def test_the_reading_of_imports() -> None:
    """Lazy imports and ``from package import module`` are seen, and told apart from those at import time."""
    assert {"errors", "linalg", "lowrank", "methods.dc", "sources.live", "adapter", ""} <= set(sources())
    assert internal(imports("lowrank")) == {"frames", "linalg"} and external(imports("lowrank")) == {"torch"}
    assert "outputs.live" in internal(imports("merged"))
    assert "outputs.live" not in internal(imports("merged", all_of_them=False))
    assert "peft_plugin" in internal(imports("registration"))


@pytest.mark.parametrize("module", sources())
def test_arrows_point_down(module: str) -> None:
    """No module knows one of a layer above it."""
    for imported in internal(imports(module)):
        assert layer(imported) <= layer(module), f"'{module or PACKAGE}' imports '{imported or PACKAGE}' from above"


def test_no_cycles() -> None:
    """The modules have an order in which each imports earlier ones only, lazy imports counted."""
    graph = {module: internal(imports(module)) - {module} for module in sources()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(sources())


@pytest.mark.parametrize("module", [name for name in sources() if any(matches(name, part) for part in MATHEMATICS)])
def test_mathematics_needs_torch_alone(module: str) -> None:
    """No Hugging Face, no files, no network in the methods, and nothing of this package but mathematics."""
    assert external(imports(module)) <= {"torch"}
    for imported in internal(imports(module)):
        assert any(matches(imported, part) for part in MATHEMATICS)


def test_importing_the_package_is_light() -> None:
    """Nothing that runs on ``import dc_merge_peft`` imports PEFT, transformers, the Hub client, a plotter or the CLI."""
    reached: set[str] = set()
    waiting = [""]
    while waiting:
        module = waiting.pop()
        if module in reached:
            continue
        reached.add(module)
        names = imports(module, all_of_them=False)
        assert not external(names) & LATE, f"'{module or PACKAGE}' imports {external(names) & LATE} at once"
        waiting.extend(internal(names))
        if (parent := module.rpartition(".")[0]) in sources():
            waiting.append(parent)
    assert {"adapter", "methods.dc", "registration"} <= reached


def test_peft_may_be_imported_by_this_package_first() -> None:
    """A program that merges from disk and calls ``add_to`` meets PEFT through this package: the hook that waits for PEFT
    must not need modules that are half-imported then."""
    code = "import dc_merge_peft.outputs.live"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize("module", [name for name in sources() if name != "paths"])
def test_places_are_asked_for_in_one_way(module: str) -> None:
    """By ``paths``: pathlib's own questions take what they may not look at for nothing, since Python 3.14."""
    for node in ast.walk(ast.parse(sources()[module].read_text(encoding="utf-8"))):
        asked = isinstance(node, ast.Attribute) and node.attr in ("exists", "is_dir", "is_file")
        assert not asked, f"'{module or PACKAGE}', line {node.lineno}: ask dc_merge_peft.paths"


@pytest.mark.parametrize("folder", [PACKAGE, "tests", "examples"])
def test_files_are_short(folder: str) -> None:
    """Under 300 lines each."""
    long = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / folder).rglob("*.py")
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) >= 300
    }
    assert long == {}


def test_public_names() -> None:
    """``__all__`` is the namespace: complete, and nothing else without an underscore but submodules, of which it names the
    two that users call by their names."""
    public = {
        name
        for name, value in vars(dc_merge_peft).items()
        if not name.startswith("_") and not isinstance(value, ModuleType) and value is not annotations
    }
    assert set(dc_merge_peft.__all__) == public | {"__version__", "metrics", "statistics"}
    assert len(dc_merge_peft.__all__) == len(set(dc_merge_peft.__all__))


@pytest.mark.parametrize("module", [name for name in sources() if "__all__" in sources()[name].read_text("utf-8")])
def test_declared_names_exist(module: str) -> None:
    """Every ``__all__`` lists names that its module defines or imports."""
    tree = ast.parse(sources()[module].read_text(encoding="utf-8"))
    (declared,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    )
    bound = {name.rpartition(".")[2] for name in imports(module)}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            bound.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound.update(target.id for target in targets if isinstance(target, ast.Name))
    assert set(declared) <= bound
