"""The notebooks of ``examples/`` run from top to bottom in a real kernel, offline, on tiny models and a loopback Hub."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from peft import PeftModel
from PIL import Image

from dc_merge_peft import DCMergeAdapter
from tests.support import models
from tests.support.hub_server import hub_server, point_client_at
from tests.support.llava import llava, make_llava_workspace
from tests.support.refused import listing
from tests.support.versions import needs_safe_pickles
from tests.support.words import llava_processor, tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
LLAVA, IN_PEFT = "merge_llava_loras.ipynb", "merge_llm_adapters_in_peft.ipynb"


def notebook(name: str) -> Any:
    """A notebook as it is stored."""
    return nbformat.read(EXAMPLES / name, as_version=4)


def parameters_cell(book: Any) -> Any:
    """The one cell that a user fills in."""
    (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    return cell


def parameters_of(book: Any) -> dict[str, Any]:
    """The parameters with their defaults."""
    namespace: dict[str, Any] = {}
    exec(parameters_cell(book).source, {}, namespace)
    return namespace


def warning_filters(lines: Sequence[str]) -> str:
    """Lines of pytest's setting (``action:message:category:module``) as code for a kernel, which that does not reach."""
    calls = ["import warnings"]
    for line in lines:
        action, message, category, module = (*line.split(":"), "", "", "")[:4]
        calls.append(f"warnings.filterwarnings({action!r}, {message!r}, {category or 'Warning'}, {module!r})")
    return "\n".join(calls)


Execute = Callable[..., str]


@pytest.fixture
def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, pytestconfig: pytest.Config) -> Execute:
    """Runs a notebook with other parameters in a kernel of its own and gives what its cells print; the first error is
    raised. Warnings are errors there too, but for those that further filters let through."""
    # Kernels are of this Python, whatever the user has installed, and leave nothing at home.
    for name in ("JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(folder.parent / name.lower()))
    # On a kernel's standard error bars are drawn although it is no terminal.
    monkeypatch.setenv("TQDM_DISABLE", "1")

    def run(name: str, parameters: Mapping[str, object], *shown: str) -> str:
        book = notebook(name)
        assert set(parameters) <= set(parameters_of(book))
        given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
        place = book.cells.index(parameters_cell(book)) + 1
        for source in (given, warning_filters([*pytestconfig.getini("filterwarnings"), *shown])):
            book.cells.insert(place, nbformat.v4.new_code_cell(source))
        # An error while the kernel shuts itself down would keep it from doing so.
        book.cells.append(nbformat.v4.new_code_cell("warnings.resetwarnings()\nwarnings.simplefilter('ignore')"))
        NotebookClient(book, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
        return printed(book)

    return run


def printed(book: Any) -> str:
    """What the cells of a notebook that has run print, tables included, pictures as ``[image/png]``."""
    found = []
    for output in (output for cell in book.cells for output in cell.get("outputs", ())):
        data = output.get("data", {})
        pictures = [f"[{kind}]\n" for kind in data if kind.startswith("image/")]
        found += pictures or [output["text"] if "text" in output else _lines(data) + "\n"]
    return re.sub(r"\x1b\[[\d;]*m", "", "".join(found))


def _lines(data: Mapping[str, str]) -> str:
    """Tables as a notebook shows them, a line a row; anything else as text."""
    if "text/html" not in data:
        return data["text/plain"]
    ended = re.sub(r"</(tr|div|caption)>", "\n", re.sub(r"</t[hd]>", " ", data["text/html"]))
    return html.unescape(re.sub(r"<[^>]*>", "", ended))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory of a notebook."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_stored_form(name: str) -> None:
    """Valid, without outputs, and with a comment above every parameter; nothing is pushed unless asked for."""
    assert name in (LLAVA, IN_PEFT), "a new notebook needs a test that runs it"
    book = notebook(name)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    lines = parameters_cell(book).source.splitlines()
    found = parameters_of(book)
    for parameter in found:
        (place,) = (index for index, line in enumerate(lines) if line.startswith(f"{parameter} = "))
        assert place and lines[place - 1].startswith("# "), f"{parameter} needs its comment"
    assert found.get("PUSH_TO") is None


def relative_difference(text: str) -> float:
    """What the notebook says of the fused model."""
    (found,) = re.findall(r"relative difference of the logits: (\S+)", text)
    return float(found)


@needs_safe_pickles
def test_llava(execute: Execute, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of the original layout and their base come from a Hub by id; inspected, merged, asked, fused, pushed."""
    made = make_llava_workspace(folder.parent / "made")
    llava_processor().save_pretrained(made / "llava-base")
    with hub_server() as server:
        point_client_at(monkeypatch, server, folder.parent, token=server.token)
        for repo, name in (("org/vqa", "LLaVA_vqa"), ("org/ocr", "LLaVA_ocr"), ("org/base", "llava-base")):
            server.add_repo(repo, listing(made / name))
        parameters = {
            "ADAPTERS": ["org/vqa", "org/ocr"], "BASE": "org/base", "RENAME": "llava-hf", "EXTRAS": "average",
            "PUSH_TO": "me/llava-merged",
        }  # fmt: skip
        text = execute(LLAVA, parameters)
        published = server.files("me/llava-merged")
    assert re.search(r"vqa, ocr +14 +-?0\.\d{3}", text) and "refused: adapter 'ocr' has non_lora_trainables.bin" in text
    kinds = re.findall(r"^\w+ (\d+) \d+ x \d+ 2 8 of 8 ", text, re.MULTILINE)
    assert sum(map(int, kinds)) == 14 and "2 adapters, method dc, alpha " in text, "14 modules of rank 8"
    assert "note: kept outside B and A" in text and "multi_modal_projector" in text
    assert re.search(r"What dc \(alpha .+\n.*\nvqa +0\.\d{3}", text), "the table of what is kept"
    assert text.count("[image/png]") == 5, "spectrum, overlap, DirSim, cover space, and what is asked about"
    answers = dict(re.findall(r"(base model|with merged|fused): +(.*)", text))
    assert answers["fused"] == answers["with merged"] != answers["base model"] and relative_difference(text) < 1e-5
    saved = listing(folder / "llava-merged")
    assert published["adapter_model.safetensors"] == saved["adapter_model.safetensors"] and "README.md" in published


def test_llava_from_directories(execute: Execute, folder: Path) -> None:
    """Adapters of transformers' layout in directories, by another method and about a picture; nothing fused or pushed."""
    make_llava_workspace(folder)
    llava_processor().save_pretrained(folder / "llava-base")
    Image.new("L", (20, 12)).save(folder / "picture.png")
    parameters = {
        "ADAPTERS": ["vqa", "ocr"], "BASE": "llava-base", "IMAGE": "picture.png", "METHOD": "tsvm", "OPTIONS": {},
        "ALPHA": 0.7, "WEIGHTS": [1.0, 0.5], "DEVICE": "cpu", "FUSED": None,
    }  # fmt: skip
    text = execute(LLAVA, parameters)
    assert "alpha 0.7" in text and "What tsvm (alpha 0.7) keeps" in text and "nothing is pushed" in text
    assert "fused:" not in text and not (folder / "llava-fused").exists()
    model = PeftModel.from_pretrained(llava(), str(folder / "llava-merged"))
    expected = DCMergeAdapter(method="tsvm", alpha=0.7).merge([folder / "vqa", folder / "ocr"], [1.0, 0.5])
    found = models.deltas(model, "default")
    assert set(found) == set(expected.modules)
    assert all(models.difference(found[name], expected.delta(name)) < 1e-5 for name in found)


def test_inside_peft(execute: Execute, folder: Path) -> None:
    """Two adapters of a language model in directories: merged, compared, tuned live, saved and loaded again."""
    base = models.llama()
    base.save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    models.save_adapters(models.with_lora(base, dict.fromkeys(("math", "code"), fields)), folder)
    parameters = {"BASE": "base", "ADAPTERS": {"math": "math", "code": "code"}}
    text = execute(IN_PEFT, parameters, "default:method 'ties' works on the entries")
    assert all(f"{method}: rank 8" in text for method in ("dc", "tsvm", "ties_dw")) and "MergeWarning" in text
    rows = dict(re.findall(r"^(base model|math|code|dc|tsvm|ties_dw) +(\d\.\d{3} +\d\.\d{3})$", text, re.MULTILINE))
    assert len(set(rows.values())) == 6 and rows["math"].startswith("0.000") and rows["code"].endswith("0.000")
    assert text.count("[image/png]") == 1
    assert all(float(distance) < 1e-6 for distance in re.findall(r"distance to the (?:one|saved).*: (\S+)", text))
    assert "adapters: math, code, kept" in text and "base model again: LlamaForCausalLM" in text

    (strength,) = re.findall(r"dc at strength (\S+)", text)
    merged = DCMergeAdapter().merge([folder / "math", folder / "code"])
    assert 0.25 <= float(strength) <= 2 and f"alpha {float(strength) * merged.alpha:.3g}," in text
    kept = models.deltas(PeftModel.from_pretrained(models.llama(), str(folder / "merged-adapter/kept")), "default")
    for name, delta in kept.items():
        assert models.difference(delta, float(strength) * merged.delta(name)) < 1e-5
