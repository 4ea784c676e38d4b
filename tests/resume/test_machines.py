"""One merge on two machines that share a file system and know nothing of each other but where process 0 is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.launching import Machine, can_make_machines, two_machines
from tests.support.many import finished, many_modules, program, wait_until
from tests.support.refused import listing

pytestmark = pytest.mark.skipif(not can_make_machines(), reason="needs namespaces of Linux, and the right to make them")

# dc-merge that misses the other machine after some seconds instead of a minute.
IMPATIENT = "from dc_merge_peft.work import team\nteam.PATIENCE = 8\nfrom dc_merge_peft.cli import main\nmain()\n"


@pytest.fixture
def machines() -> Iterator[tuple[Machine, Machine]]:
    """Two machines on one wire."""
    with two_machines() as both:
        yield both


def test_what_one_machine_writes(tmp_path: Path, machines: tuple[Machine, Machine]) -> None:
    """The same bytes, and nothing of the work is left."""
    many_modules(tmp_path, 12)
    finished(program(["merge", "lora-0", "lora-1", "-o", "one"], tmp_path))
    first, second = (machine.launches(["merge", "lora-0", "lora-1", "-o", "two"], tmp_path) for machine in machines)
    assert "error" not in finished(second) + finished(first)
    assert listing(tmp_path / "two") == listing(tmp_path / "one") and not list(tmp_path.glob(".*"))


def test_a_machine_dies(tmp_path: Path, machines: tuple[Machine, Machine]) -> None:
    """In the middle: the other one misses it, says so and keeps what is finished; the next run needs one machine alone."""
    many_modules(tmp_path, 60, size=300, rank=24)
    (tmp_path / "impatient.py").write_text(IMPATIENT, encoding="utf-8")
    arguments, work = ["merge", "lora-0", "lora-1", "-o", "out", "--resume"], tmp_path / ".out.dc-merge-work"
    first, second = (machine.launches(arguments, tmp_path, program=["impatient.py"]) for machine in machines)
    wait_until(lambda: len(list(work.glob("*.module"))) > 2, first)
    machines[1].dies()
    second.communicate()
    errors = finished(first, code=1)
    assert "process 1 of 2 has ended, or shows no sign of life" in errors and "share the output's file system" in errors
    assert not (tmp_path / "out").exists() and len(list(work.glob("*.module"))) > 2
    finished(program(arguments, tmp_path))
    finished(program(["merge", "lora-0", "lora-1", "-o", "plain"], tmp_path))
    assert listing(tmp_path / "out") == listing(tmp_path / "plain")


def test_an_output_that_only_one_machine_sees(tmp_path: Path, machines: tuple[Machine, Machine]) -> None:
    """A disk of its own at the output's place: both say what is expected, and nothing is left."""
    many_modules(tmp_path, 2)
    (tmp_path / "impatient.py").write_text(IMPATIENT, encoding="utf-8")
    (tmp_path / "here").mkdir()
    machines[1].runs("mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "here"))
    arguments = ["merge", "lora-0", "lora-1", "-o", "here/out"]
    first, second = (machine.launches(arguments, tmp_path, program=["impatient.py"]) for machine in machines)
    errors = finished(second, code=1)
    assert "process 1 on 'machine-1' does not see" in errors and "a file system that all machines share" in errors
    assert "process 1 of 2 has ended, or shows no sign of life" in finished(first, code=1)
    assert not list((tmp_path / "here").iterdir())
