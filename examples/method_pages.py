"""Write the options and the source of every method into its page in docs/methods, and the list of all into the guide, from
the methods themselves, so that no default is typed.

python examples/method_pages.py
"""

from __future__ import annotations

import re
from pathlib import Path

from dc_merge_peft.cli.methods import describe_method
from dc_merge_peft.combination_types import combination_types
from dc_merge_peft.methods import METHODS

FOLDER = Path(__file__).parent.parent / "docs/methods"
GUIDE = FOLDER / "index.md"


def options_block(name: str) -> str:
    """The option table of one method, and the paper it is from."""
    described = describe_method(name)
    rows = [
        f"| `{option['name']}` | `{option['default']}` | {_cell(option['type'])} | {_cell(option['help'])} |"
        for option in described["options"]
    ]
    header = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    return "\n" + "\n".join([*header, *rows]) + f"\n\nSource: {described['reference']}.\n\n"


def methods_block() -> str:
    """One row a method: name, title, its name in PEFT."""
    names = {method: kind for kind, method in combination_types().items()}
    rows = [f"| [`{name}`]({name}.md) | {_cell(method.title)} | `{names[name]}` |" for name, method in METHODS.items()]
    return "\n" + "\n".join(["| method | what it does | in PEFT |", "| --- | --- | --- |", *rows]) + "\n\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def rendered(page: Path, word: str, block: str) -> str:
    """The page with what stands between its markers made anew."""
    pattern = re.compile(rf"(<!-- {word}:[^\n]*-->\n).*?(<!-- /{word} -->)", re.DOTALL)
    text, count = pattern.subn(lambda match: match[1] + block + match[2], page.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{page} has {count} blocks between <!-- {word}: .. --> and <!-- /{word} -->: expected one")
    return text


def pages() -> dict[Path, str]:
    """Every page as it should be."""
    texts = {FOLDER / f"{name}.md": rendered(FOLDER / f"{name}.md", "options", options_block(name)) for name in METHODS}
    return texts | {GUIDE: rendered(GUIDE, "methods", methods_block())}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
