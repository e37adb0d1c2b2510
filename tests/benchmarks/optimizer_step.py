"""Time of ``optimizer.step()``: ours against torch's and, where installed, pytorch-optimizer's.

    python -m tests.benchmarks.optimizer_step [--cases sasrec t5_d128 ...] [--rounds 15] [--threads 2] [--dtype float32]

Every contender steps once a round, in an order that rotates, so that a busy machine slows all of them. Ratios are
formed within each round and given as median (min-max). All train the same parameters with the same gradients; the
matrices go to Muon with five Newton-Schulz steps in the contender's default precision, the rest to fused AdamW.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from lightning_muon import HybridOptimizer, Muon


class Case(NamedTuple):
    """Shapes of a model: ``matrices`` and ``rest`` hold (count, shape) pairs."""

    matrices: list[tuple[int, tuple[int, int]]]
    rest: list[tuple[int, tuple[int, ...]]]
    rounds: int


CASES = {
    "sasrec": Case([(8, (64, 64)), (2, (256, 64)), (2, (64, 256))], [(1, (12102, 64)), (1, (50, 64)), (30, (64,))], 31),
    "t5_d128": Case(
        [(36, (384, 128)), (12, (128, 384)), (8, (1024, 128)), (8, (128, 1024))], [(1, (1027, 128)), (32, (128,))], 15
    ),
    "t5_d384": Case([(48, (384, 384)), (8, (1024, 384)), (8, (384, 1024))], [(1, (1027, 384)), (32, (384,))], 7),
    "small640": Case([(512, (64, 64)), (128, (64, 256))], [(32, (64,))], 9),
    "gpt2_small": Case(
        [(12, (2304, 768)), (12, (768, 768)), (12, (3072, 768)), (12, (768, 3072))],
        [(1, (50257, 768)), (1, (1024, 768)), (98, (768,))],
        3,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=None, help="rounds a case (default: by size)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the parameters")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    console = Console(width=130)
    console.print(f"torch {torch.__version__}, {where}, {options.threads} threads, {options.dtype} parameters")
    for name in options.cases:
        case = CASES[name]
        console.print(run_case(name, case, options.rounds or case.rounds, getattr(torch, options.dtype), device))


def run_case(name: str, case: Case, rounds: int, dtype: torch.dtype, device: torch.device) -> Table:
    """Measure all contenders on one case."""
    steps: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    for label, build in contenders().items():
        matrices, rest = make_parameters(case, dtype, device)
        steps[label] = build(matrices, rest)
        first[label] = timed(steps[label], device)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    labels = list(steps)
    for index in range(rounds):
        turn = index % len(labels)
        for label in labels[turn:] + labels[:turn]:
            seconds[label].append(timed(steps[label], device))
    table = Table(title=f"{name}, {rounds} rounds")
    for column in ("optimizer", "ms median (min-max)", "x torch Muon + AdamW", "x AdamW", "first step ms"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for label, own in seconds.items():
        ms = f"{1e3 * statistics.median(own):.2f} ({1e3 * min(own):.2f}-{1e3 * max(own):.2f})"
        ratios = (ratio(own, seconds[base]) for base in ("torch Muon + AdamW", "torch AdamW fused"))
        table.add_row(label, ms, *ratios, f"{1e3 * first[label]:.1f}")
    return table


def contenders() -> dict[str, Callable[[list[nn.Parameter], list[nn.Parameter]], Callable[[], object]]]:
    """Label -> function that builds an optimizer and returns what makes one step."""

    def adamw(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Callable[[], object]:
        return torch.optim.AdamW([*matrices, *rest], fused=True).step

    def torch_muon(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Callable[[], object]:
        both = torch.optim.Muon(matrices), torch.optim.AdamW(rest, fused=True)
        return lambda: [optimizer.step() for optimizer in both]

    def ours(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Callable[[], object]:
        return HybridOptimizer({"other": torch.optim.AdamW(rest, fused=True), "matrix": Muon(matrices)}).step

    def pytorch_optimizer_muon(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Callable[[], object]:
        from pytorch_optimizer import Muon as Peer

        both = Peer([{"params": matrices, "use_muon": True}]), torch.optim.AdamW(rest, fused=True)
        return lambda: [optimizer.step() for optimizer in both]

    found = {"torch AdamW fused": adamw, "torch Muon + AdamW": torch_muon, "lightning_muon": ours}
    if importlib.util.find_spec("pytorch_optimizer"):
        found["pytorch_optimizer Muon + AdamW"] = pytorch_optimizer_muon
    return found


def make_parameters(
    case: Case, dtype: torch.dtype, device: torch.device
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Equal parameters with equal gradients for every contender."""
    generator = torch.Generator().manual_seed(0)

    def make(shapes: list[tuple[int, tuple[int, ...]]]) -> list[nn.Parameter]:
        parameters = []
        for count, shape in shapes:
            for _ in range(count):
                parameter = nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
                parameter.grad = torch.randn(shape, generator=generator).to(device, dtype)
                parameters.append(parameter)
        return parameters

    return make(list(case.matrices)), make(case.rest)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Seconds of one step, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def ratio(own: list[float], base: list[float]) -> str:
    """Median (min-max) of the ratios within rounds."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


if __name__ == "__main__":
    main()
