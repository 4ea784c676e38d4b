"""``dc-merge fuse`` as a whole process against the least that any program must do, in one run, on the same files.

By default a base model of TinyLlama's shape (1.1 billion random numbers in bfloat16, shards of 600 MB) and four adapters of rank
16 on all linear layers. The least is to read the base model, to form and add one m x n x k product for every module (k the
ranks together), and to write as many bytes; each is timed by itself with everything in the page cache. Also printed: the
largest resident memory of the process, against one shard and 1 GB. Everything is made in a temporary folder of some 5 GB and
deleted.

    python examples/benchmarks/fuse.py
    python examples/benchmarks/fuse.py --layers 4 --hidden 512   # smaller
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def make_base(folder: Path, args: argparse.Namespace) -> dict[str, tuple[int, int]]:
    """A random Llama on disk; the shapes of its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.hidden * 11 // 4,
        num_hidden_layers=args.layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    model.save_pretrained(folder, max_shard_size=args.shard)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if name.endswith(LINEAR) and isinstance(module, torch.nn.Linear)
    }


def make_adapters(folder: Path, shapes: dict[str, tuple[int, int]], args: argparse.Namespace) -> list[Path]:
    """Random adapters of one rank on all these layers."""
    made = []
    for number in range(args.tasks):
        generator = torch.Generator().manual_seed(number + 1)
        tensors = {}
        for name, (m, n) in shapes.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(args.rank, n, generator=generator) / n**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(m, args.rank, generator=generator) * 0.02
        place = folder / f"task-{number}"
        place.mkdir()
        save_file(
            {key: value.to(torch.bfloat16) for key, value in tensors.items()}, place / "adapter_model.safetensors"
        )
        config = {"peft_type": "LORA", "r": args.rank, "lora_alpha": args.rank, "target_modules": list(LINEAR)}
        (place / "adapter_config.json").write_text(json.dumps({**config, "task_type": "CAUSAL_LM"}))
        made.append(place)
    return made


def floor(base: Path, scratch: Path, shapes: dict[str, tuple[int, int]], args: argparse.Namespace) -> dict[str, float]:
    """Seconds to read the files, to form and add the products, and to write as many bytes, all of which stay until the end."""
    scratch.mkdir()
    seconds = {"read": 0.0, "products": 0.0, "write": 0.0}
    for file in sorted(base.glob("*.safetensors")):
        start = time.perf_counter()
        content = bytearray(file.stat().st_size)
        with file.open("rb", buffering=0) as opened:
            done = 0
            while done < len(content):
                done += opened.readinto(memoryview(content)[done:])
        seconds["read"] += time.perf_counter() - start
        start = time.perf_counter()
        with (scratch / file.name).open("wb", buffering=0) as opened:
            done = 0
            while done < len(content):
                done += opened.write(memoryview(content)[done:])
        seconds["write"] += time.perf_counter() - start
    k = args.tasks * args.rank
    for m, n in shapes.values():
        weight, B, A = torch.zeros(m, n, dtype=torch.bfloat16), torch.randn(m, k), torch.randn(k, n)
        wide = torch.zeros(m, n)  # before the clock starts, so that its pages cost nothing
        start = time.perf_counter()
        weight.copy_(wide.copy_(weight).addmm_(B, A))
        seconds["products"] += time.perf_counter() - start
    shutil.rmtree(scratch)
    return seconds


def fuse(base: Path, adapters: list[Path], out: Path, args: argparse.Namespace) -> tuple[float, int]:
    """Seconds of the whole process, and its largest resident memory in bytes."""
    command = [sys.executable, "-m", "dc_merge_peft", "fuse", str(base), *map(str, adapters), "-o", str(out)]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--method", args.method, "--max-shard-size", args.shard], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit("dc-merge fuse failed")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def runs(args: argparse.Namespace) -> Iterator[tuple[dict[str, float], float, int, int]]:
    """For each repetition the floor, the seconds, the memory, and the size of the largest shard.

    Everything large is in a helper process: a process that is started counts the memory of the one that starts it.
    """
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(dir=args.folder) as name, spawn.Pool(1) as helper:
        folder = Path(name)
        base, out = folder / "base", folder / "out"
        shapes = helper.apply(make_base, (base, args))
        adapters = helper.apply(make_adapters, (folder, shapes, args))
        largest = max(file.stat().st_size for file in base.glob("*.safetensors"))
        for _ in range(args.repeat):
            least = helper.apply(floor, (base, folder / "floor", shapes, args))
            seconds, memory = fuse(base, adapters, out, args)
            shutil.rmtree(out)
            yield least, seconds, memory, largest


def main() -> None:
    """Run both and print their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048, help="a multiple of 64")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--shard", default="600MB", help="largest weight file, in and out")
    parser.add_argument("--method", default="dc")
    parser.add_argument("--repeat", type=int, default=3, help="the median counts")
    parser.add_argument("--folder", help="where the temporary folder is made")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    args = parser.parse_args()
    found = list(runs(args))
    least = {part: statistics.median(run[0][part] for run in found) for part in found[0][0]}
    seconds = statistics.median(run[1] for run in found)
    memory, largest = max(run[2] for run in found), found[0][3]
    outcome = {
        "threads": torch.get_num_threads(),
        **{f"floor_{part}_seconds": value for part, value in least.items()},
        "floor_seconds": sum(least.values()),
        "fuse_seconds": seconds,
        "ratio": statistics.median(run[1] / sum(run[0].values()) for run in found),
        "peak_memory_bytes": memory,
        "largest_shard_bytes": largest,
        "memory_beyond_one_shard_bytes": memory - largest,
    }
    if args.json:
        print(json.dumps(outcome))
        return
    for name, value in outcome.items():
        shown = f"{value / 1e6:.0f} MB" if name.endswith("bytes") else f"{value:.4g}"
        print(f"{name.removesuffix('_bytes').replace('_', ' '):32}{shown}")


if __name__ == "__main__":
    main()
