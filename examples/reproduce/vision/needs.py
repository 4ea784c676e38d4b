"""What one of the vision tables needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from accuracy.contenders import Contender

from reproduce.needs import Need, Plan
from reproduce.vision.backbones import Backbone
from reproduce.vision.benches import PAPER_GRID
from reproduce.vision.heads import head_file, stored_head
from reproduce.vision.images import Place
from reproduce.vision.parts import LARGEST
from reproduce.vision.tasks import TASKS

DRAWS = 500
SIDE = 224
SECONDS_PER_SVD = 0.5  # a guess for estimates
# GB of the original images for training and test, where they are large; of others some 20 kB an image.
LARGE = {"Cars": 2, "DTD": 0.6, "SUN397": 14, "OxfordIIITPet": 0.8, "PCAM": 8, "Food101": 5}


def plan(
    title: str,
    backbone: Backbone,
    base: str,
    tasks: Sequence[str],
    counts: Sequence[int],
    setting: str,
    places: Mapping[str, Place | None],
    checkpoints: Mapping[str, str | None],
    contenders: Sequence[Contender],
    cache: Path,
    heads: Path | None = None,
    remarks: Sequence[str] = (),
) -> Plan:
    """The list, with estimates from the sizes of the test parts."""
    needs = [Need(f"CLIP {backbone.name}", base, backbone.gigabytes)]
    for task in tasks:
        place, checkpoint = places[task], checkpoints[task]
        needs.append(_images(task, place))
        needs.append(_checkpoint(task, checkpoint, setting, backbone))
        needs += [_head(task, heads)] if heads is not None else []
    if any(place is not None and place.hub is not None for place in places.values()) and not find_spec("datasets"):
        needs.append(
            Need("the package datasets", "nowhere", 0.1, "pip install '.[reproduce]', which reads images from the Hub")
        )
    sizes = {task: TASKS[task].test_size for task in tasks}
    validation = {task: int(0.2 * size) if setting == "lora" else LARGEST for task, size in sizes.items()}
    test, held = sum(sizes.values()), sum(validation.values())
    # At every alpha of the grid, and at the two that are reported.
    looks = sum(len(PAPER_GRID) * validation[task] + 2 * sizes[task] for count in counts for task in tasks[:count])
    matrices = 4 * backbone.layers * sum(counts) if setting == "fft" else 0
    towers = backbone.tower_gigabytes * (len(tasks) + 1) if setting == "fft" else 0.02 * len(tasks)
    return Plan(
        title,
        needs,
        disk=(test + held) * 3 * SIDE**2 / 1e9 + 2 * towers,
        memory=4 + test * DRAWS * 8 / 1e9 + backbone.gigabytes * 3 + towers,
        gpu=2 + 3 * backbone.tower_gigabytes,
        hours=(looks * len(contenders) + (test + held) * 2) / backbone.images_per_second / 3600
        + len(contenders) * matrices * SECONDS_PER_SVD / 3600,
        cache=cache,
        remarks=remarks,
    )


def _images(task: str, place: Place | None) -> Need:
    missing = f"no id of the Hub is known; give --data DIR with a folder {task}, or --dataset {task}=ID"
    size = LARGE.get(task, TASKS[task].test_size * 4 * 20e3 / 1e9)  # the training data come along
    if place is not None and place.hub is not None:
        size *= 2  # the package datasets keeps the files that it fetches, and tables that it makes of them
    return Need(f"images of {task}", str(place) if place else "nowhere", size, "" if place else missing)


def _checkpoint(task: str, checkpoint: str | None, setting: str, backbone: Backbone) -> Need:
    what = f"LoRA adapter of {task}" if setting == "lora" else f"fine-tuned tower of {task}"
    missing = f"give --checkpoints DIR with a folder {task}, or --checkpoint {task}=PLACE"
    size = 0.005 if setting == "lora" else backbone.tower_gigabytes
    return Need(what, checkpoint or "nowhere", size, "" if checkpoint else missing)


def _head(task: str, folder: Path) -> Need:
    try:
        file = head_file(folder, TASKS[task])
        stored_head(file, TASKS[task].classes)
    except SystemExit as error:
        return Need(f"head of {task}", str(folder), missing=str(error))
    return Need(f"head of {task}", str(file))
