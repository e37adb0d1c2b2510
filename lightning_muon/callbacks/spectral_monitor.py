"""SpectralMonitor: what the callbacks that measure matrices share."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich import get_console
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks import figures
from lightning_muon.callbacks.arguments import check_count, check_globs, check_multiple
from lightning_muon.callbacks.history import History, write_csv
from lightning_muon.callbacks.matrices import WatchedParameter, find_matrices, select
from lightning_muon.callbacks.probe import Depth, Kind, MatrixProbe, Measurement, Plan
from lightning_muon.callbacks.quantity import Quantity
from lightning_muon.callbacks.report import Movement, monitor_table
from lightning_muon.partition import ParameterRule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_EVERY_N_STEPS = 50
"""How often to measure under a Trainer that never logs."""

SPECTRUM_FACTOR = 10
"""How many times rarer exact spectra are by default."""


class SpectralMonitor(Callback):
    """Base of the callbacks that log what the singular values of weights and updates say.

    A step is measured where ``every_n_steps`` divides its number (counted from 1) and the optimizer really stepped:
    once for several accumulated batches, and not where mixed precision skipped the step. Values are logged at the step
    at which the loss of that batch is. Training is not touched: no random numbers are drawn, and outside of measured
    steps nothing happens. Several monitors share one pass: each matrix is gathered and decomposed once a step.

    Watched are the matrices that the partition finds, whatever the optimizer: fused projections, experts and gates
    block by block, as ``<parameter>.0``, ``<parameter>.1``, ...; frozen parameters are left out until they are thawed.

    Loggers and ``trainer.callback_metrics`` get ``<quantity>/mean`` and, of all matrices, the one that is worst off,
    ``<quantity>/max`` or ``/min``; on request ``<quantity>/<matrix>``. At the end of an epoch a table shows what moved,
    and warns. At the end of the fit TensorBoard and W&B get figures; without them PNG and CSV files go to
    ``<trainer.log_dir>/spectral``.

    Args:
        every_n_steps: how often to measure; None for the Trainer's ``log_every_n_steps``.
        spectrum_every_n_steps: how often to compute all singular values; None for 10 times ``every_n_steps``, of which
            it has to be a multiple, and 0 for never.
        include: globs on parameter names, in place of the matrices of the partition: ``["*"]`` for all that can be read
            as matrices, embeddings and heads included.
        exclude: globs on the names of parameters to leave out.
        per_parameter: log each matrix, not only aggregates.
        print_table: print a table at the end of an epoch.
        plot: make figures at the end of the fit; takes matplotlib.
        parameter_rules: rules of the partition, where neither a :class:`lightning_muon.HybridOptimizer` brings one nor
            the module has rules of its own.
        max_spectrum_size: matrices with more rows and columns than this are not decomposed.
        max_spectra: how many matrices are decomposed at most, evenly chosen.
        prefix: goes before each key. Later instances of a class with the same prefix get ``-1``, ``-2``, ... behind the
            names of their quantities.

    Raises:
        MisconfigurationException: for values out of range, intervals that are no multiples, and globs that match
            nothing.
    """

    quantities: Sequence[Quantity]
    """What is reported; set by subclasses."""
    name: str
    """What the monitor's files are called; set by subclasses."""

    def __init__(
        self,
        every_n_steps: int | None = None,
        spectrum_every_n_steps: int | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        per_parameter: bool = False,
        print_table: bool = True,
        plot: bool = True,
        parameter_rules: list[ParameterRule] | None = None,
        max_spectrum_size: int = 1024,
        max_spectra: int = 64,
        prefix: str = "",
    ) -> None:
        if every_n_steps is not None:
            check_count("every_n_steps", every_n_steps, 1)
        if spectrum_every_n_steps is not None:
            check_count("spectrum_every_n_steps", spectrum_every_n_steps, 0)
        check_count("max_spectrum_size", max_spectrum_size, 1)
        check_count("max_spectra", max_spectra, 1)
        check_globs("include", include)
        check_globs("exclude", exclude)
        if every_n_steps:
            check_multiple("spectrum_every_n_steps", spectrum_every_n_steps or 0, "every_n_steps", every_n_steps)
        self.every_n_steps = every_n_steps
        self.spectrum_every_n_steps = spectrum_every_n_steps
        self.include = include
        self.exclude = exclude
        self.per_parameter = per_parameter
        self.print_table = print_table
        self.plot = plot
        self.parameter_rules: Sequence[ParameterRule] = tuple(parameter_rules or ())
        self.max_spectrum_size = max_spectrum_size
        self.max_spectra = max_spectra
        self.prefix = prefix
        self.histories: dict[str, History] = {}
        """What was measured, by key: at most 512 steps, evenly thinned."""
        self._tabled: dict[str, dict[str, Any]] = {}
        self._vectors: dict[str, Tensor] = {}
        self._interval = self._spectrum_interval = 0
        self._watched: list[WatchedParameter] = []
        self._probe: MatrixProbe | None = None
        self._suffix = ""
        self._directory: Path | None = None

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._generate_state_key(**self.settings())

    def settings(self) -> dict[str, Any]:
        """What decides about the values; extended by subclasses."""
        return {
            "every_n_steps": self.every_n_steps,
            "spectrum_every_n_steps": self.spectrum_every_n_steps,
            "include": self.include,
            "exclude": self.exclude,
            "prefix": self.prefix,
        }

    def state_dict(self) -> dict[str, Any]:
        self._keep_vectors()
        return {
            "histories": {key: history.state_dict() for key, history in self.histories.items()},
            "tabled": {key: dict(row) for key, row in self._tabled.items()},
            "vectors": dict(self._vectors),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.histories = {}
        for key, saved in state_dict["histories"].items():
            self.histories[key] = History()
            self.histories[key].load_state_dict(saved)
        self._tabled = {key: dict(row) for key, row in state_dict["tabled"].items()}
        self._vectors = dict(state_dict["vectors"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._interval = self.every_n_steps or trainer.log_every_n_steps or DEFAULT_EVERY_N_STEPS  # type: ignore[attr-defined]
        spectrum = self.spectrum_every_n_steps
        self._spectrum_interval = SPECTRUM_FACTOR * self._interval if spectrum is None else spectrum
        check_multiple("spectrum_every_n_steps", self._spectrum_interval, "every_n_steps", self._interval)
        monitors = _monitors(trainer)
        twins = [m for m in monitors if type(m) is type(self) and m.prefix == self.prefix]
        self._suffix = f"-{twins.index(self)}" if twins.index(self) else ""
        if monitors[0] is self and not trainer.loggers:
            names = ", ".join(dict.fromkeys(type(monitor).__name__ for monitor in monitors))
            rank_zero_warn(
                f"The Trainer has no logger: {names} can show what they measure in tables, in files and in "
                "trainer.callback_metrics only."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: strategies may replace parameters, and callbacks may freeze them, until the fit begins.
        monitors = _monitors(trainer)
        if _step(trainer) == 0:  # not a run that goes on
            self.forget()
        self._watched = select(
            find_matrices(pl_module, trainer.optimizers, self.parameter_rules), self.include, self.exclude
        )
        if not self._watched:
            rank_zero_warn(f"{type(self).__name__} watches nothing: {type(pl_module).__name__} has no hidden matrix.")
        self._warn_of_large_matrices()
        if self is monitors[-1]:
            self._share_probe(monitors)
        log_dir = trainer.log_dir  # on every process: they agree on it
        self._directory = None if log_dir is None or trainer.fast_dev_run else Path(log_dir) / "spectral"  # type: ignore[attr-defined]

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._probe is not None and self._due(step := _step(trainer)):
            self._probe.before_step(step, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is None or not self._due(step := _step(trainer)):
            return
        measurements = self._probe.after_step(step)
        if not measurements:
            return
        logged: dict[str, float] = {}
        for quantity in self.quantities:
            values = self._values(quantity, measurements, step)
            if values:
                key = self.key(quantity.key)
                self.histories.setdefault(quantity.key, History()).append(step, values)
                logged.update(_aggregates(key, quantity.extreme, values))
                if self.per_parameter:
                    logged.update({f"{key}/{name}": value for name, value in values.items()})
        self.remember(step, measurements)
        # Not by log_dict: it repeats a value at every later step of the epoch that is logged.
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in logged.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitors = _monitors(trainer)
        if self is monitors[-1]:
            shown = [movement for m in monitors if m.print_table for movement in m.movements()]
            if shown:
                _print(monitor_table(shown, f"Matrices after step {_step(trainer)} (epoch {trainer.current_epoch})"))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    def forget(self) -> None:
        """Drop what was measured, at the start of a new run."""
        self.histories, self._tabled, self._vectors = {}, {}, {}

    def remember(self, step: int, measurements: Iterable[Measurement]) -> None:
        """Keep what figures need besides the histories; for subclasses."""

    def figures(self) -> dict[str, Figure]:
        """Figures of what was measured, by tag: a heat map of each quantity, matrices by steps."""
        return {
            self.key(quantity.key): figures.heat_map(
                self.histories[quantity.key],
                self.key(quantity.key),
                quantity.label,
                f"{quantity.label}, {quantity.kind}s",
            )
            for quantity in self.quantities
            if len(self.histories.get(quantity.key, ()))
        }

    def movements(self) -> list[Movement]:
        """What the table shows: a row a quantity that was measured since the last table."""
        rows = []
        for quantity in self.quantities:
            history = self.histories.get(quantity.key)
            last = self._tabled.get(quantity.key, {"step": None, "values": None})
            if not history or last["step"] == history.steps[-1]:
                continue
            step, values = history.steps[-1], history.row(-1)
            key = self.key(quantity.key)
            rows.append(Movement(key, step, values, last["values"], quantity.extreme, quantity.alarm, last["step"]))
            self._tabled[quantity.key] = {"step": step, "values": values}
        return rows

    def key(self, name: str) -> str:
        """Under which a quantity of this instance is logged."""
        return f"{self.prefix}{name}{self._suffix}"

    def watched_matrices(self) -> dict[str, tuple[int, int]]:
        """(m, n) of the matrices that are watched now, in the module's order; frozen ones are not."""
        trained = [watched for watched in self._watched if watched.parameter.requires_grad]
        return {name: shape for watched in trained for name, shape in watched.shapes.items()}

    def due_spectrum(self, step: int) -> bool:
        """Whether exact spectra are computed after this step."""
        return self._spectrum_interval > 0 and (step + 1) % self._spectrum_interval == 0

    def demand(self, step: int) -> Plan:
        """What to measure after a step."""
        if not self._due(step):
            return {}
        depths: dict[Kind, Depth] = {}
        for quantity in self.quantities:
            if quantity.depth < Depth.SPECTRUM or self.due_spectrum(step):
                depths[quantity.kind] = max(quantity.depth, depths.get(quantity.kind, Depth.NORM))
        matrices = self.watched_matrices()
        small = [name for name, shape in matrices.items() if min(shape) <= self.max_spectrum_size]
        count = min(len(small), self.max_spectra)
        decomposed = {small[index * len(small) // count] for index in range(count)}
        return {
            (kind, name): min(depth, Depth.SPECTRUM if name in decomposed else Depth.GRAM)
            for kind, depth in depths.items()
            for name in matrices
        }

    def _values(self, quantity: Quantity, measurements: Iterable[Measurement], step: int) -> dict[str, float]:
        """The quantity of the matrices that this monitor watches, as far as this step is on its clock."""
        if quantity.depth is Depth.SPECTRUM and not self.due_spectrum(step):
            return {}
        found: dict[str, float] = {}
        for measurement in measurements:
            if measurement.kind == quantity.kind and measurement.depth >= quantity.depth:
                values = quantity.measure(measurement.spectra, measurement.shape).tolist()
                zero = (measurement.spectra.frobenius_norm == 0).tolist()
                found.update(
                    (name, value)
                    for name, value, nothing in zip(measurement.names, values, zero, strict=True)
                    if quantity.kind == "weight" or not nothing
                )
        return {name: found[name] for name in self.watched_matrices() if name in found}

    def _due(self, step: int) -> bool:
        return (step + 1) % self._interval == 0

    def _share_probe(self, monitors: Sequence[SpectralMonitor]) -> None:
        """One probe for all monitors, which watches what any of them does; made by the last one."""
        # Rules of one monitor may read a parameter otherwise than those of another.
        union = {(w.parameter, tuple(w.shapes)): w for monitor in monitors for w in monitor._watched}
        probe = MatrixProbe(list(union.values()), [monitor.demand for monitor in monitors])
        for monitor in monitors:
            probe.vectors.update(monitor._vectors)
            monitor._probe = probe

    def _warn_of_large_matrices(self) -> None:
        keys = [quantity.key for quantity in self.quantities if quantity.depth is Depth.SPECTRUM]
        sizes = [min(shape) for watched in self._watched for shape in watched.shapes.values()]
        large = [size for size in sizes if size > self.max_spectrum_size]
        if keys and self._spectrum_interval and large:
            rank_zero_warn(
                f"{type(self).__name__} has {', '.join(keys)} of {len(sizes) - len(large)} of {len(sizes)} matrices: "
                f"the others have more than max_spectrum_size={self.max_spectrum_size} rows and columns, up to "
                f"{max(large)}, and would take long. Raise it to include them."
            )

    def _keep_vectors(self) -> None:
        if self._probe is not None:
            vectors = self._probe.vectors
            names = [name for watched in self._watched for name in watched.shapes]
            self._vectors = {name: vectors[name].cpu() for name in names if name in vectors}

    def _finish(self, trainer: Trainer) -> None:
        if self._probe is None:
            return
        self._probe.close()
        self._keep_vectors()
        self._probe = None
        self._watched = []
        try:
            self._publish(trainer)
        except OSError as error:  # no reason to fail, or to hide why the fit did
            rank_zero_warn(f"{type(self).__name__} could not write what it measured: {error}")

    @rank_zero_only
    def _publish(self, trainer: Trainer) -> None:
        """Figures to the loggers that show them; else PNG and CSV files."""
        measured = {self.key(q.key): self.histories[q.key] for q in self.quantities if q.key in self.histories}
        if self._directory is None or not measured:
            return
        drawn: Mapping[str, Figure] = {}
        if self.plot and figures.figures_available():
            drawn = self.figures()
        elif self.plot and self is _monitors(trainer)[0]:
            rank_zero_warn("Figures of the spectral monitors take matplotlib: pip install 'lightning-muon[plot]'.")
        last = max(history.steps[-1] for history in measured.values())
        if figures.publish({f"spectral/{tag}": figure for tag, figure in drawn.items()}, trainer.loggers, last):
            return
        figures.save_pngs(drawn, self._directory)
        write_csv(self._directory / f"{self.prefix.replace('/', '_')}{self.name}{self._suffix}.csv", measured)


def _step(trainer: Trainer) -> int:
    """The step under which loggers file what is logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # as in Lightning's own LearningRateMonitor


def _monitors(trainer: Trainer) -> list[SpectralMonitor]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SpectralMonitor)]


def _aggregates(key: str, extreme: Literal["max", "min"], values: Mapping[str, float]) -> dict[str, float]:
    numbers = list(values.values())
    worst = math.nan if any(map(math.isnan, numbers)) else (max(numbers) if extreme == "max" else min(numbers))
    return {f"{key}/mean": math.fsum(numbers) / len(numbers), f"{key}/{extreme}": worst}


@rank_zero_only
def _print(table: Any) -> None:
    get_console().print(table)
