"""Write the names, the options and the source of every method into its page in docs/methods, the list of all into the guide,
and their classes into the API reference, from the methods themselves, so that no default is typed.

python examples/method_pages.py
"""

from __future__ import annotations

import re
from pathlib import Path

from dc_merge_peft.cli.methods import describe_method
from dc_merge_peft.methods import EVERY_METHOD

FOLDER = Path(__file__).parent.parent / "docs/methods"
GUIDE = FOLDER / "index.md"
API = FOLDER.parent / "api.md"


def options_block(name: str) -> str:
    """The option table of one method, and the paper it is from."""
    described = describe_method(name)
    rows = [
        f"| `{option['name']}` | `{option['default']}` | {_cell(option['type'])} | {_cell(option['help'])} |"
        for option in described["options"]
    ]
    header = ["| option | default | values | meaning |", "| --- | --- | --- | --- |"]
    source, link = described["reference"], EVERY_METHOD[name].link
    return "\n" + "\n".join([*header, *rows]) + f"\n\nSource: {f'[{source}]({link})' if link else source}.\n\n"


def methods_block() -> str:
    """One row a method: name, title, its name in PEFT."""
    rows = [
        f"| [`{name}`]({name}.md) | {_cell(method.title)} | `{describe_method(name)['peft']}` |"
        for name, method in EVERY_METHOD.items()
    ]
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


def names_line(name: str) -> str:
    """What the method is called in Python, on the command line and in PEFT: the first line of its page."""
    peft = describe_method(name)["peft"]
    return f'`method="{name}"`, `--method {name}`, `combination_type="{peft}"` in PEFT\n'


def method_page(name: str) -> str:
    """The page of one method as it should be."""
    page = FOLDER / f"{name}.md"
    text, count = re.subn(
        r"^`method=[^\n]*\n", names_line(name), rendered(page, "options", options_block(name)), flags=re.M
    )
    if count != 1:
        raise ValueError(f"{page} has {count} lines that start with `method=..`: expected one")
    return text


def reference_block() -> str:
    """The class of every method and that of its options, for mkdocstrings."""
    lines = []
    for method in EVERY_METHOD.values():
        for described in (method, method.Config):
            lines += [f"::: {described.__module__}.{described.__name__}", "    options:", "      members: false", ""]
    return "\n" + "\n".join(lines) + "\n"


def pages() -> dict[Path, str]:
    """Every page as it should be."""
    texts = {FOLDER / f"{name}.md": method_page(name) for name in EVERY_METHOD}
    return texts | {
        GUIDE: rendered(GUIDE, "methods", methods_block()),
        API: rendered(API, "reference", reference_block()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
