"""YAML files, which may be a stranger's, in bounded time and memory."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import yaml

LARGEST = 500_000  # bytes of a configuration, and values in it; one of a large merge has some thousands
_DEEPEST = 100  # mappings and lists in each other; one of a merge has five
# Characters, of which 0xfff... has 4215 digits; Python makes no text of a number of more than 4300.
_LONGEST_NUMBER = 3500
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _Loader(yaml.SafeLoader):
    """Refuses numbers that are too long to be any: 0xfff..., and 1:1:1:..., which counts in sixties, are some, too."""

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> str:
        if node.tag in _NUMBERS and len(node.value) > _LONGEST_NUMBER:
            raise ValueError(f"it has a number of {len(node.value)} characters ({node.value[:20]}...)")
        return super().construct_scalar(node)


def bounded_yaml(path: Path) -> object:
    """The content of a YAML file that is no larger than it looks: aliases and merge keys can stand for billions of values.

    Raises:
        OSError: it can't be read.
        ValueError: it is larger, or nested too deep, gives a name twice, or has an endless number.
        yaml.YAMLError: it is no YAML.
    """
    if path.stat().st_size > LARGEST:
        raise ValueError(f"it has {path.stat().st_size} bytes, expected at most {LARGEST}")
    text = path.read_text(encoding="utf-8")
    tree = yaml.compose(text, Loader=yaml.SafeLoader)
    count, depth = _unfolded(tree, {})
    if count > LARGEST:
        raise ValueError("its aliases stand for too many values")
    if depth > _DEEPEST:
        raise ValueError("it is nested too deep")
    if twice := _repeated(tree):
        raise ValueError(f"it gives '{twice}' twice")
    return yaml.load(text, Loader=_Loader)


def _repeated(node: yaml.Node | None) -> str | None:
    """A name that a mapping gives twice, of which YAML would take the last; mappings in mappings, too."""
    if not isinstance(node, yaml.MappingNode):
        return None
    names = Counter(key.value for key, _ in node.value if isinstance(key.value, str) and key.value != "<<")
    twice = next((name for name, count in names.items() if count > 1), None)
    return twice or next(filter(None, (_repeated(value) for _, value in node.value)), None)


def _unfolded(node: yaml.Node | None, known: dict[int, tuple[float, float]]) -> tuple[float, float]:
    """How many values a node stands for, and how deep they lie in each other; both without end where it holds itself."""
    if id(node) not in known:
        known[id(node)] = float("inf"), float("inf")  # until it is known
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        parts = (part for child in children for part in (child if isinstance(child, tuple) else (child,)))
        found = [_unfolded(part, known) for part in parts]
        known[id(node)] = 1 + sum(count for count, _ in found), 1 + max((depth for _, depth in found), default=0)
    return known[id(node)]
