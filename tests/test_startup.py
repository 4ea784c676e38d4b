"""How processes begin: importing the package leaves Python's garbage collector as it was; the program asks for large pages, and for no semaphores."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dc_merge_peft.startup import large_pages, uncollected

# What a process finds before and after the import, and after a cycle that the collector alone can free.
PROGRAM = """
import gc, json, sys, weakref
{before}
start = [gc.isenabled(), gc.get_freeze_count() > 0]
passes = []
gc.callbacks.append(lambda phase, info: passes.append(phase))
import dc_merge_peft
during = len(passes)
class Ring: pass
ring = Ring(); ring.itself = ring
known = weakref.ref(ring)
del ring
gc.collect()
print(json.dumps({{"start": start, "end": [gc.isenabled(), gc.get_freeze_count() > 0], "during": during, "freed": known() is None}}))
"""


def imported(before: str = "") -> dict[str, object]:
    program = PROGRAM.format(before=before)
    return json.loads(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True).stdout)


def test_collector_rests_while_the_package_is_imported() -> None:
    found = imported()
    assert found["start"] == found["end"] == [True, False]
    assert found["freed"]
    # A few come before the pause, with what the package imports to make it; without one there are hundreds.
    assert int(str(found["during"])) < 20


def test_collector_that_somebody_stopped_stays_stopped() -> None:
    found = imported("gc.disable()")
    assert found["start"] == found["end"] == [False, False]


def test_objects_that_somebody_froze_stay_frozen() -> None:
    found = imported("gc.freeze()")
    assert found["start"] == found["end"] == [True, True]


def test_collector_is_back_after_an_import_that_fails() -> None:
    seen = []

    def fail() -> None:
        with uncollected():
            seen.append(gc.isenabled())
            raise ImportError("none")

    with pytest.raises(ImportError, match="none"):
        fail()
    assert [*seen, gc.isenabled()] == [False, True]


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="the system knows no large pages")
@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_the_program_asks_for_large_pages(given: str | None, expected: str) -> None:
    """Before torch needs any memory, and unless the user has said otherwise; importing the package asks for nothing."""
    program = (
        "import os, dc_merge_peft.cli as cli\n"
        "before = os.environ.get('THP_MEM_ALLOC_ENABLE')\n"
        "cli.app = lambda: print(before, os.environ['THP_MEM_ALLOC_ENABLE'])\n"
        "cli.main()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    environment |= {} if given is None else {"THP_MEM_ALLOC_ENABLE": given}
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, env=environment)
    assert found.stdout.split() == [str(given), expected]


def test_nothing_is_asked_of_a_system_without_large_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch would warn that it got none."""
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "")  # so that it is as before in the end
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE")
    large_pages(tmp_path / "none")
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_bars_of_the_program_span_no_processes() -> None:
    """A bar whose lock other processes could take needs a semaphore, and since Python 3.14 a process that watches it."""
    program = (
        "import sys, dc_merge_peft.cli as cli\n"
        "from dc_merge_peft.progress import progress_bar\n"
        "cli.app = lambda: list(progress_bar(False)([1], 'one'))\n"
        "cli.main()\n"
        "print('multiprocessing.synchronize' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "False"
