"""Time of ``optimizer.step()``: ours against torch's and, where installed, pytorch-optimizer's; and of every rule.

    python -m tests.benchmarks.optimizer_step [--cases sasrec t5_d128 ...] [--rounds 15] [--threads 2] [--dtype float32]
    python -m tests.benchmarks.optimizer_step --rules [...]

Every contender steps once a round, in an order that rotates, so that a busy machine slows all of them. Ratios are
formed within each round and given as median (min-max). All train the same parameters with the same gradients; the
matrices go to Muon with five Newton-Schulz steps in the contender's default precision, the rest to fused AdamW.

With ``--rules`` the contenders are all rules of this package on the matrices alone, each with its defaults, and the
table has their state per weight. The rounds after a rule's first steps are timed: what a rule does every 2,000 steps
(Conda's basis) is only in the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeAlias

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.optimizer import Optimizer

import lightning_muon
from lightning_muon import (
    HybridOptimizer,
    MatrixOptimizer,
    MomentumOptimizer,
    Muon,
    OrthogonalizingOptimizer,
    WeightAwareOptimizer,
)
from lightning_muon.experimental import SpecMuon


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
    parser.add_argument("--rules", action="store_true", help="compare the rules of this package")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    console = Console(width=130)
    console.print(f"torch {torch.__version__}, {where}, {options.threads} threads, {options.dtype} parameters")
    compared = rules() if options.rules else contenders()
    bases = ["Muon"] if options.rules else ["torch Muon + AdamW", "torch AdamW fused"]
    for name in options.cases:
        case = CASES[name]
        rounds = options.rounds or case.rounds
        console.print(run_case(name, case, rounds, getattr(torch, options.dtype), device, compared, bases))


Contender: TypeAlias = Callable[[list[nn.Parameter], list[nn.Parameter]], Optimizer | list[Optimizer]]


def run_case(
    name: str,
    case: Case,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
    compared: dict[str, Contender],
    bases: list[str],
) -> Table:
    """Measure all contenders on one case; ratios are over each of ``bases``."""
    steps: dict[str, Callable[[], object]] = {}
    first: dict[str, float] = {}
    state: dict[str, float] = {}
    for label, build in compared.items():
        matrices, rest = make_parameters(case, dtype, device)
        built = build(matrices, rest)
        optimizers = built if isinstance(built, list) else [built]
        steps[label] = partial(step_all, optimizers)
        first[label] = timed(steps[label], device)
        state[label] = state_per_weight(optimizers)
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {label: [] for label in steps}
    labels = list(steps)
    for index in range(rounds):
        turn = index % len(labels)
        for label in labels[turn:] + labels[:turn]:
            seconds[label].append(timed(steps[label], device))
    table = Table(title=f"{name}, {rounds} rounds")
    columns = ["optimizer", "ms median (min-max)", *(f"x {base}" for base in bases), "first step ms", "state / weight"]
    for column in columns:
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for label, own in seconds.items():
        ms = f"{1e3 * statistics.median(own):.2f} ({1e3 * min(own):.2f}-{1e3 * max(own):.2f})"
        ratios = (ratio(own, seconds[base]) for base in bases)
        table.add_row(label, ms, *ratios, f"{1e3 * first[label]:.1f}", f"{state[label]:.2f}")
    return table


def rules() -> dict[str, Contender]:
    """Every rule that the package exports, on the matrices alone, and MuonSphere."""
    exported = [*vars(lightning_muon).values(), SpecMuon]
    bases = (MatrixOptimizer, MomentumOptimizer, OrthogonalizingOptimizer, WeightAwareOptimizer)
    found = {
        rule.__name__: rule
        for rule in exported
        if inspect.isclass(rule) and issubclass(rule, MatrixOptimizer) and rule not in bases
    }
    found["MuonSphere"] = partial(lightning_muon.SpectralSphere, lambda_search=False)
    return {label: lambda matrices, rest, rule=rule: rule(matrices) for label, rule in found.items()}


def contenders() -> dict[str, Contender]:
    """Ours and others', each for matrices and rest."""

    def adamw(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Optimizer:
        return torch.optim.AdamW([*matrices, *rest], fused=True)

    def torch_muon(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> list[Optimizer]:
        return [torch.optim.Muon(matrices), torch.optim.AdamW(rest, fused=True)]

    def ours(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> Optimizer:
        return HybridOptimizer({"other": torch.optim.AdamW(rest, fused=True), "matrix": Muon(matrices)})

    def pytorch_optimizer_muon(matrices: list[nn.Parameter], rest: list[nn.Parameter]) -> list[Optimizer]:
        from pytorch_optimizer import Muon as Peer

        return [Peer([{"params": matrices, "use_muon": True}]), torch.optim.AdamW(rest, fused=True)]

    found: dict[str, Contender] = {"torch AdamW fused": adamw, "torch Muon + AdamW": torch_muon, "lightning_muon": ours}
    if importlib.util.find_spec("pytorch_optimizer"):
        found["pytorch_optimizer Muon + AdamW"] = pytorch_optimizer_muon
    return found


def step_all(optimizers: list[Optimizer]) -> None:
    """One step of each; with a closure that returns a loss, for the rules that need it."""
    for optimizer in optimizers:
        optimizer.step(lambda: 1.0)


def state_per_weight(optimizers: list[Optimizer]) -> float:
    """Elements of state for each parameter element."""
    weights = sum(p.numel() for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    held = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    return sum(value.numel() for value in held if isinstance(value, torch.Tensor)) / weights


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
