"""Time of generative recommenders to rank the catalogue for 1,000 users by a constrained beam search.

    python -m tests.benchmarks.beam_search [--device cpu|cuda] [--beams 50] [--users 1000] [--rounds 3] [--threads 1]

The catalogue has the size of Amazon Beauty: 12,101 items with four random codes of 256 per level, all distinct.
Histories are 20 random items. TIGER has the sizes of the paper (arXiv 2305.05065), the language model of semantic ids
its defaults; both have random weights. The time includes all of the evaluation except the metrics: reading the history,
the beam search, and scoring the items.

Models in float32 and under bfloat16 autocast take turns in a rotating order, so a busy machine slows all of them. The
first, untimed round ranks one batch. Figures are medians over rounds (min-max), scaled to 1,000 users.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor

from examples.recsys.models import TIGER, GenerativeRecommender, SemanticIdLM
from examples.recsys.semantic_ids.codes import SemanticIds

NUM_ITEMS, LEVELS, CODEBOOK_SIZE = 12_101, 4, 256
LENGTH = 20

MODELS: dict[str, type[GenerativeRecommender]] = {"TIGER": TIGER, "SemanticIdLM": SemanticIdLM}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--beams", type=int, default=50)
    parser.add_argument("--users", type=int, default=1_000, help="users a round")
    parser.add_argument("--batch_size", type=int, default=100, help="users at a time")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    for name in ("beams", "users", "batch_size", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(options, name)}.")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    console = Console(width=130)
    console.print(f"{versions}, {where}, {options.threads} threads, load {os.getloadavg()[0]:.1f}")
    histories = torch.randint(1, NUM_ITEMS + 1, (options.users, LENGTH), device=device)
    console.print(run(contenders(options.beams, device), histories, options.batch_size, options.rounds, device))
    console.print(f"load {os.getloadavg()[0]:.1f}")


Ranking: TypeAlias = Callable[[Tensor], Tensor]


def run(compared: dict[str, Ranking], histories: Tensor, batch_size: int, rounds: int, device: torch.device) -> Table:
    """Measure all contenders; times are in seconds for the users of the run, figures for 1,000 users."""
    batches = histories.split(batch_size)
    for rank in compared.values():
        timed(rank, batches[:1], device)
    seconds: dict[str, list[float]] = {label: [] for label in compared}
    labels = list(compared)
    for index in range(rounds):
        turn = index % len(labels)
        for label in labels[turn:] + labels[:turn]:
            seconds[label].append(timed(compared[label], batches, device) * 1_000 / len(histories))
    table = Table(title=f"{rounds} rounds of {len(histories)} users, {len(batches[0])} at a time")
    table.add_column("model")
    table.add_column("s / 1,000 users, median (min-max)", justify="right")
    for label, own in seconds.items():
        table.add_row(label, f"{statistics.median(own):,.2f} ({min(own):,.2f}-{max(own):,.2f})")
    return table


def contenders(beams: int, device: torch.device) -> dict[str, Ranking]:
    """Functions from histories (B, T) to scores (B, num_items), one per model and precision."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "codes.csv")
        random_codes().write(path)
        models = {name: build(NUM_ITEMS, path, num_beams=beams).eval().to(device) for name, build in MODELS.items()}
    return {
        f"{name}, {beams} beams, {precision}": partial(rank, model, precision == "bfloat16 autocast")
        for name, model in models.items()
        for precision in ("float32", "bfloat16 autocast")
    }


def random_codes() -> SemanticIds:
    """Random codes, all distinct; there are enough items for every code of a level to occur."""
    numbers = torch.randint(CODEBOOK_SIZE**LEVELS, (2 * NUM_ITEMS,)).unique()
    numbers = numbers[torch.randperm(len(numbers))[:NUM_ITEMS]]
    places = CODEBOOK_SIZE ** torch.arange(LEVELS)
    return SemanticIds(numbers[:, None] // places % CODEBOOK_SIZE)


@torch.no_grad()
def rank(model: GenerativeRecommender, mixed: bool, histories: Tensor) -> Tensor:
    with torch.autocast(histories.device.type, torch.bfloat16, enabled=mixed):
        return model(histories)


def timed(rank: Ranking, batches: tuple[Tensor, ...], device: torch.device) -> float:
    """Seconds to rank all batches, including the work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for batch in batches:
        rank(batch)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
