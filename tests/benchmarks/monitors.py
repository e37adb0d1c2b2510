"""What the three monitors cost in training, step by step within runs of a Trainer.

    python -m tests.benchmarks.monitors [--cases sasrec transformer] [--steps N] [--rounds N] [--threads 1]
        [--data_dir ../shared/data/amazon2014] [--device cpu] [--clock wall] [--whole]

Whole runs differ by more than 1 % on a busy machine. So a run with monitors measures every second step, and what a
measured step takes longer than the steps beside it is a cost; the same of a run without monitors, on the same batches
and with a logger that writes at the same steps, is taken off. A step is everything from the start of a batch to the
start of the next one: data, forward and backward pass, optimizer, hooks, logger. Runs with and without monitors, and
the optimizers, alternate; figures are medians over rounds (min-max). The optimizers are Muon, which shows its updates,
and AdamW for all matrices, of which the monitors take differences of weights.

``--clock cpu`` counts the time that the process has a processor, over all its threads: with one thread, on a machine
that others use, about the figures of a quiet one. With ``--whole`` the cost of a measurement also comes from whole
runs: with one at every step, against none.
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from rich import get_console
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from examples.recsys.data import AmazonReviews2014
from examples.recsys.models import SASRec
from lightning_muon import Muon, MuonMixin
from lightning_muon.callbacks import EffectiveRankMonitor, SpectralNormMonitor, UpdateOrthogonalityMonitor

EVERY = 2
"""Measured and other steps alternate."""

SPECTRUM_EVERY = 6
"""Every third measurement has exact spectra."""

WARM_UP = 6
"""Steps at the start of a run that do not count: power iteration begins, allocators fill."""

LEAST_STEPS = WARM_UP + 2 * SPECTRUM_EVERY + 2

CONFIGS = Path(__file__).parents[2] / "configs"

Clock: TypeAlias = Callable[[], float]

CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


class Case(NamedTuple):
    """A model by name of its optimizer, the data to train it on, and how much of it."""

    models: Mapping[str, Callable[[], pl.LightningModule]]
    data: pl.LightningDataModule
    steps: int
    rounds: int


class Absent(Exception):
    """A case lacks its data."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--steps", type=int, default=None, help="steps a run (default: by case)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds a case (default: by case)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--data_dir", default="../shared/data/amazon2014", help="folder that holds Beauty.txt")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--whole", action="store_true", help="measure by whole runs as well")
    options = parser.parse_args()
    if options.steps is not None and options.steps < LEAST_STEPS:
        parser.error(f"--steps {options.steps} leaves too few measured steps: give {LEAST_STEPS} or more.")
    get_console().quiet = True  # the monitors' tables are made and not shown
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    device = torch.device(options.device)
    clock = partial(now, CLOCKS[options.clock], device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    console = Console(width=130)
    threads = f"{options.threads} threads, {options.clock} time, load {os.getloadavg()[0]:.1f}"
    console.print(f"torch {torch.__version__}, {where}, {threads}")
    for name in options.cases:
        try:
            case = CASES[name](options.data_dir)
        except Absent as reason:
            console.print(f"{name} is skipped: {reason}")
            continue
        case = case._replace(steps=options.steps or case.steps, rounds=options.rounds or case.rounds)
        console.print(run_case(name, case, device, clock, options.whole))
        console.print(f"load {os.getloadavg()[0]:.1f}")


def run_case(name: str, case: Case, device: torch.device, clock: Clock, whole: bool) -> Table:
    """Measure the monitors under each optimizer."""
    rounds: dict[str, list[dict[str, float]]] = {label: [] for label in case.models}
    for index in range(case.rounds):
        for label, model in case.models.items():
            run = partial(fit, model, case, index, device, clock)
            figures = by_step(*pair(run, index, EVERY, SPECTRUM_EVERY))
            if whole:
                figures["one measurement, from whole runs, ms"] = by_run(*pair(run, index, 1, 0))
            rounds[label].append(figures)
    table = Table(title=f"{name}, {case.rounds} rounds of {case.steps} steps, median (min-max)")
    table.add_column("")
    for label in case.models:
        table.add_column(label, justify="right")
    for row in next(iter(rounds.values()))[0]:
        table.add_row(row, *(spread([figures[row] for figures in own]) for own in rounds.values()))
    return table


class Times(NamedTuple):
    """Seconds of the steps of a run, NaN where an epoch ends; and between the first and last callback by hook."""

    steps: list[float]
    hooks: dict[str, float]


def pair(run: Callable[[int, int | None], Times], index: int, every: int, spectrum: int) -> tuple[Times, Times]:
    """A run without monitors and one with them, in an order that alternates."""
    if index % 2:
        watched = run(every, spectrum)
        return run(every, None), watched
    return run(every, None), run(every, spectrum)


def by_step(control: Times, watched: Times) -> dict[str, float]:
    """Figures of a round, from the steps of both runs."""
    measured = [k for k in range(WARM_UP, len(control.steps) - 1) if (k + 1) % EVERY == 0]
    spectra = [k for k in measured if (k + 1) % SPECTRUM_EVERY == 0]
    plain = [k for k in measured if (k + 1) % SPECTRUM_EVERY]
    step = median([control.steps[k + 1] for k in measured])
    one = excess(control, watched, plain)
    more = excess(control, watched, spectra) - one
    rare = 100 * more / step / 500
    return {
        "step, ms": 1e3 * step,
        "one measurement, ms": 1e3 * one,
        "exact spectra on top, ms": 1e3 * more,
        "every_n_steps=50 adds, % (target: at most 1)": 100 * one / step / 50,
        "spectra every 500 steps on top, % (target: at most 2)": rare,
        "every_n_steps=1, spectra every 500 add, %": 100 * one / step + rare,
        "once a fit: start, ms": 1e3 * (watched.hooks["on_train_start"] - control.hooks["on_train_start"]),
        "once an epoch: table, ms": 1e3 * (watched.hooks["on_train_epoch_end"] - control.hooks["on_train_epoch_end"]),
        "once a fit: figures and files, s": watched.hooks["on_train_end"] - control.hooks["on_train_end"],
    }


def by_run(control: Times, watched: Times) -> float:
    """Milliseconds of a measurement, from the mean steps of a run that measures at each of them and of one without."""
    return 1e3 * (mean(watched.steps[WARM_UP:]) - mean(control.steps[WARM_UP:]))


def excess(control: Times, watched: Times, steps: Sequence[int]) -> float:
    """How much longer some steps take than the mean of the two beside them, and that more than without monitors."""

    def over(seconds: Sequence[float], k: int) -> float:
        return seconds[k] - (seconds[k - 1] + seconds[k + 1]) / 2

    return median([over(watched.steps, k) - over(control.steps, k) for k in steps])


def median(values: Sequence[float]) -> float:
    return statistics.median(value for value in values if not math.isnan(value))


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(value for value in values if not math.isnan(value))


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def fit(
    model: Callable[[], pl.LightningModule],
    case: Case,
    seed: int,
    device: torch.device,
    clock: Clock,
    every: int,
    spectrum: int | None,
) -> Times:
    """Train, log every so many steps, and measure then where ``spectrum`` is not None; the seed sets the batches."""
    pl.seed_everything(seed, verbose=False)
    first = First(clock)
    monitors: list[pl.Callback] = []
    if spectrum is not None:
        plot = spectrum > 0  # whole runs leave figures out
        monitors = [
            SpectralNormMonitor(every, plot=plot),
            UpdateOrthogonalityMonitor(every, spectrum_every_n_steps=spectrum, plot=plot),
            EffectiveRankMonitor(every, spectrum_every_n_steps=spectrum, plot=plot),
        ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu" if device.type == "cpu" else "gpu",
            devices=1 if device.index is None else [device.index],
            max_steps=case.steps,
            logger=CSVLogger(folder),
            log_every_n_steps=every,
            callbacks=[first, *monitors, Last(first)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            num_sanity_val_steps=0,
        )
        trainer.fit(model(), datamodule=case.data)
    return Times(first.steps, first.hooks)


def now(clock: Clock, device: torch.device) -> float:
    """Seconds, with the device's work done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock()


class First(pl.Callback):
    """Before all others: times steps, and opens the hooks that :class:`Last` closes."""

    def __init__(self, clock: Clock) -> None:
        self.now = clock
        self.steps: list[float] = []
        self.hooks: dict[str, float] = {}
        self.opened = math.nan
        self._begun = math.nan

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.opened = self.now()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        now = self.now()
        if trainer.global_step:
            self.steps.append(now - self._begun)
        self._begun = now

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begun = math.nan
        self.opened = self.now()

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.opened = self.now()


class Last(pl.Callback):
    """After all others: how long they took in the hooks of the run and of its last epoch."""

    def __init__(self, first: First) -> None:
        self.first = first

    def _close(self, hook: str) -> None:
        self.first.hooks[hook] = self.first.now() - self.first.opened

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close("on_train_start")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close("on_train_epoch_end")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close("on_train_end")


def sasrec(data_dir: str) -> Case:
    """SASRec on Amazon Beauty as its config sets it up; AdamW with the learning rate of Muon."""
    model, source = (yaml.safe_load((CONFIGS / name).read_text()) for name in ("model/sasrec.yaml", "data/beauty.yaml"))
    data = AmazonReviews2014(**{**source["data"]["init_args"], "data_dir": data_dir})
    if not data.path.exists():
        raise Absent(f"there is no {data.path}; --data_dir names the folder that holds {data.path.name}.")
    arguments = dict(model["model"]["init_args"])
    matrix = arguments.pop("matrix_optimizer")["init_args"]
    other = partial(torch.optim.AdamW, **arguments.pop("other_optimizer")["init_args"])
    build = partial(
        SASRec, data.num_items, data.max_length, mask_history=data.mask_history, other_optimizer=other, **arguments
    )
    models = {
        "Muon": partial(build, matrix_optimizer=partial(Muon, **matrix)),
        "AdamW": partial(build, matrix_optimizer=partial(torch.optim.AdamW, **matrix)),
    }
    return Case(models, data, steps=120, rounds=3)


def transformer(data_dir: str) -> Case:
    """A small language model on random tokens, which take as long as others."""
    models: dict[str, Callable[[], pl.LightningModule]] = {
        "Muon": Transformer,
        "AdamW": partial(Transformer, matrix_optimizer=partial(torch.optim.AdamW, lr=3e-4)),
    }
    return Case(models, RandomTokens(), steps=26, rounds=3)


CASES: dict[str, Callable[[str], Case]] = {"sasrec": sasrec, "transformer": transformer}

VOCABULARY, BATCH, LENGTH = 1_000, 8, 128


class Transformer(MuonMixin, pl.LightningModule):
    """Four pre-norm layers of width 384, causal."""

    def __init__(self, width: int = 384, heads: int = 6, ffn: int = 1536, layers: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, ffn, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(LENGTH), persistent=False)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        tokens, targets = batch
        x = self.tokens(tokens) + self.positions.weight
        for layer in self.layers:
            x = layer(x, src_mask=self.mask, is_causal=True)
        loss = nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())
        self.log("train/loss", loss)
        return loss


class RandomTokens(pl.LightningDataModule):
    """The same 64 batches in the same order, always."""

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        drawn = torch.randint(VOCABULARY, (64 * BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(drawn[:, :-1], drawn[:, 1:]), batch_size=BATCH)


if __name__ == "__main__":
    main()
