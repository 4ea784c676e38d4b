"""The notebooks of ``examples/`` run from top to bottom in a real kernel, offline, on tiny models and a loopback Hub."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support import models
from tests.support.hub_server import hub_server, point_client_at
from tests.support.llava import make_llava_workspace
from tests.support.refused import listing

EXAMPLES = Path(__file__).parent.parent / "examples"
LLAVA, IN_PEFT = "merge_llava_loras.ipynb", "merge_llm_adapters_in_peft.ipynb"


def notebook(name: str) -> Any:
    """A notebook as it is stored."""
    return nbformat.read(EXAMPLES / name, as_version=4)


def execute(name: str, folder: Path, parameters: Mapping[str, object]) -> str:
    """Run it in a kernel of its own with other parameters; what its cells print, pictures as ``[image/png]``."""
    book = notebook(name)
    (cell,) = (cell for cell in book.cells if "parameters" in cell.metadata.get("tags", ()))
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    book.cells.insert(book.cells.index(cell) + 1, nbformat.v4.new_code_cell(given))
    with warnings.catch_warnings():
        # jupyter_client asks the event loop in a way that newer Pythons warn about.
        warnings.simplefilter("ignore", DeprecationWarning)
        NotebookClient(book, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    said = []
    for output in (output for cell in book.cells for output in cell.get("outputs", ())):
        said.append(output.get("text", "") or "".join(f"[{kind}]" for kind in output.get("data", {})))
    return "".join(said)


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.ipynb")))
def test_stored_form(name: str) -> None:
    """Valid, without outputs, and with a comment above every parameter."""
    assert name in (LLAVA, IN_PEFT)
    book = notebook(name)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    lines = next(cell.source for cell in code if "parameters" in cell.metadata.get("tags", ())).splitlines()
    for before, line in zip(["", *lines], lines):
        if re.match(r"[A-Z_]+ = ", line):
            assert before.startswith("# "), f"{line} needs its comment"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_llava(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters of the original layout and their base come from a Hub by id; inspected, merged, plotted, fused, pushed."""
    made = make_llava_workspace(tmp_path / "made")
    with hub_server() as server:
        point_client_at(monkeypatch, server, tmp_path, token=server.token)
        for repo, folder in (("org/vqa", "LLaVA_vqa"), ("org/ocr", "LLaVA_ocr"), ("org/base", "llava-base")):
            server.add_repo(repo, listing(made / folder))
        parameters = {
            "ADAPTERS": ["org/vqa", "org/ocr"], "BASE": "org/base", "RENAME": "llava-hf", "EXTRAS": "average",
            "PUSH_TO": "me/llava-merged",
        }  # fmt: skip
        said = execute(LLAVA, tmp_path, parameters)
        published = server.files("me/llava-merged")
    assert re.search(r"vqa and ocr: cosine -?\d\.\d{3}", said)
    assert "14 modules, rank 8" in said and "multi_modal_projector" in said
    assert said.count("[image/png]") == 4
    difference = re.search(r"relative difference of the answers: (\S+)", said)
    assert difference is not None and float(difference[1]) < 1e-4
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(published)
    assert (tmp_path / "llava-merged").is_dir() and (tmp_path / "llava-fused" / "config.json").is_file()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_inside_peft(tmp_path: Path) -> None:
    """Two adapters of a language model in directories: merged, compared, tuned live, saved and loaded again."""
    base = models.llama()
    base.save_pretrained(tmp_path / "base")
    fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    math, code = models.save_adapters(models.with_lora(base, dict.fromkeys(("math", "code"), fields)), tmp_path)
    parameters = {
        "BASE": str(tmp_path / "base"), "PROMPT": None, "ADAPTERS": {"math": str(math), "code": str(code)}
    }  # fmt: skip
    said = execute(IN_PEFT, tmp_path, parameters)
    assert "back at the first answer: True" in said and "same answer from disk: True" in said
    distances = [float(number) for number in re.findall(r"'math': (\d\.\d+)", said)]
    assert len(distances) == 6 and len(set(distances)) > 3, "the strength changes the answers"
