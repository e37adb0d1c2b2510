"""SpectralMonitor: the base class of the callbacks that measure matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_muon.callbacks.arguments import check_count, check_globs, check_multiple
from lightning_muon.callbacks.clock import Clock
from lightning_muon.callbacks.notices import warn_of_limits, warn_of_no_matrix, warn_of_nothing
from lightning_muon.callbacks.output import show_run, where_all_values_are
from lightning_muon.callbacks.running import known_to_optimizers
from lightning_muon.diagnostics import figures
from lightning_muon.diagnostics.heat_maps import Map, heat_maps
from lightning_muon.diagnostics.history import History
from lightning_muon.diagnostics.matrices import WatchedParameter, evenly_chosen, find_matrices, select
from lightning_muon.diagnostics.probe import Depth, Kind, MatrixProbe, Measurement, Plan
from lightning_muon.diagnostics.quantity import Quantity, mean, worst
from lightning_muon.diagnostics.report import MonitorTable, Movement
from lightning_muon.partition import ParameterRule
from lightning_muon.tables import print_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULT_EVERY_N_STEPS = 50
"""How often to measure under a Trainer that never logs."""

SPECTRUM_FACTOR = 10
"""Default ratio of ``spectrum_every_n_steps`` to ``every_n_steps``."""


class SpectralMonitor(Callback):
    """Base class of the callbacks that log statistics of the singular values of weights and updates.

    A step is measured if ``every_n_steps`` divides its number (counted from 1) and the optimizer stepped. Accumulated
    batches count as one step, and a step that mixed precision skipped is not measured. In manual optimization the next
    step of an optimizer is measured. Values are logged at the same step as the loss of that batch, counted from 0.
    Training does not change: no random numbers are drawn, and nothing happens outside of measured steps. Several
    monitors share one pass: each matrix is gathered and decomposed once a step.

    The matrices of the partition are watched, whatever the optimizer. Fused projections, gates and experts are measured
    block by block: as ``<parameter>.q``, ``<parameter>.k``, ... if it is known which block is what, else as
    ``<parameter>.0``, ``<parameter>.1``, ... Frozen parameters are left out until they are unfrozen.

    Loggers and ``trainer.callback_metrics`` get ``<quantity>/mean`` and the value of the worst matrix,
    ``<quantity>/max`` or ``/min``; with ``per_parameter`` also ``<quantity>/<matrix>``. At the end of an epoch a dozen
    lines show the largest changes and warnings. At the end of the fit TensorBoard and W&B get figures; without them PNG
    and CSV files are written to ``<trainer.log_dir>/spectral``.

    Args:
        every_n_steps: how often to measure; None for the Trainer's ``log_every_n_steps``.
        spectrum_every_n_steps: how often to compute all singular values: a multiple of ``every_n_steps``; None for 10
            times ``every_n_steps``, 0 for never.
        include: globs on parameter names, to watch these instead of the matrices of the partition: ``["*"]`` for all
            that can be read as matrices, including embeddings and heads.
        exclude: globs on the names of parameters to leave out.
        per_parameter: log each matrix, not only aggregates.
        print_table: print a table at the end of an epoch.
        plot: make figures at the end of the fit; needs matplotlib and about a second for each. With TensorBoard or W&B
            no file is written. With any other logger, or none, the measurements are written as CSV, with or without
            ``plot``.
        parameter_rules: rules of the partition, besides the module's own; they have no effect if a
            :class:`lightning_muon.HybridOptimizer` of all parameters has its own partition.
        max_spectrum_size: matrices whose smaller side exceeds this are not decomposed.
        max_spectra: largest number of matrices to decompose, evenly chosen.
        prefix: prefix of each key. Later instances of a class with the same prefix append ``-1``, ``-2``, ... to the
            names of their quantities.

    Raises:
        MisconfigurationException: for values out of range, intervals that are not multiples, and globs that match
            nothing.
    """

    quantities: Sequence[Quantity]
    """Quantities to report; set by subclasses."""
    name: str
    """Name of the monitor's files; set by subclasses."""

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
        if not isinstance(prefix, str):
            raise MisconfigurationException(f"prefix must be a string, got {prefix!r}.")
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
        """Measurements by key: at most 512 steps; older ones are thinned out."""
        self._tabled: dict[str, dict[str, Any]] = {}
        self._vectors: dict[str, Tensor] = {}
        self.clock = Clock(DEFAULT_EVERY_N_STEPS, 0)
        self._watched: list[WatchedParameter] = []
        self._probe: MatrixProbe | None = None
        self._suffix = ""
        self._directory: Path | None = None

    @property
    def state_key(self) -> str:
        """Tells instances with different settings apart in a checkpoint."""
        return self._generate_state_key(**self.settings())

    def settings(self) -> dict[str, Any]:
        """Return the arguments that tell instances apart; extended by subclasses."""
        return {
            "every_n_steps": self.every_n_steps,
            "spectrum_every_n_steps": self.spectrum_every_n_steps,
            "include": self.include,
            "exclude": self.exclude,
            "prefix": self.prefix,
            "per_parameter": self.per_parameter,
            "parameter_rules": [str(rule) for rule in self.parameter_rules],
            "max_spectrum_size": self.max_spectrum_size,
            "max_spectra": self.max_spectra,
        }

    def state_dict(self) -> dict[str, Any]:
        self._keep_vectors()
        return {
            "histories": {key: history.state_dict() for key, history in self.histories.items()},
            "shown": {quantity.key: [self.key(quantity.key), quantity.label] for quantity in self.quantities},
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
        interval = self.every_n_steps or trainer.log_every_n_steps or DEFAULT_EVERY_N_STEPS  # type: ignore[attr-defined]
        spectrum = self.spectrum_every_n_steps
        spectrum = SPECTRUM_FACTOR * interval if spectrum is None else spectrum
        check_multiple("spectrum_every_n_steps", spectrum, "every_n_steps", interval)
        self.clock = Clock(interval, spectrum)
        monitors = _monitors(trainer)
        twins = [m for m in monitors if type(m) is type(self) and m.prefix == self.prefix]
        self._suffix = f"-{twins.index(self)}" if twins.index(self) else ""
        if monitors[0] is self and not trainer.loggers:
            names = ", ".join(dict.fromkeys(type(monitor).__name__ for monitor in monitors))
            rank_zero_warn(
                f"The Trainer has no logger: {names} can show measurements only in tables, in files and in "
                "trainer.callback_metrics."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not earlier: strategies may replace parameters, and callbacks may freeze them, until the fit begins.
        monitors = _monitors(trainer)
        if _step(trainer) == 0:  # not a resumed run
            self.forget()
        known = known_to_optimizers(trainer.optimizers)
        self._watched = select(find_matrices(pl_module, known, self.parameter_rules), self.include, self.exclude)
        self._warn_of_what_is_left_out(type(pl_module).__name__)
        if self is monitors[-1]:
            self._share_probe(monitors)
        log_dir = trainer.log_dir  # on every process: it broadcasts
        self._directory = None if log_dir is None else Path(log_dir) / "spectral"

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._probe is not None and self.clock.due(step := _step(trainer)):
            self._probe.before_step(step, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._probe is None or not self.clock.due(step := _step(trainer)):
            return
        measurements = self._probe.after_step(step)
        if not measurements:
            if not pl_module.automatic_optimization:
                self.clock.postpone(step)
            return
        plan = self.demand(step)
        logged: dict[str, float] = {}
        for quantity in self.quantities:
            values = self._values(quantity, measurements, plan)
            if values:
                key = self.key(quantity.key)
                self.histories.setdefault(quantity.key, History()).append(step, values)
                logged[f"{key}/mean"] = mean(values.values())
                logged[f"{key}/{quantity.extreme}"] = values[worst(values, quantity.extreme)]
                if self.per_parameter:
                    logged.update({f"{key}/{name}": value for name, value in values.items()})
        self.remember(step, measurements)
        self.clock.measured()
        # Not by log_dict: it repeats a value at every later step of the epoch that is logged.
        for logger in trainer.loggers:
            logger.log_metrics(logged, step=step)
        trainer.callback_metrics.update({key: torch.tensor(value) for key, value in logged.items()})

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitors = _monitors(trainer)
        if self is monitors[-1]:
            shown = [movement for m in monitors if m.print_table for movement in m.take_movements()]
            if shown:
                step = max(movement.step for movement in shown)
                whole = where_all_values_are(trainer.loggers, self._directory, any(m.per_parameter for m in monitors))
                _print(MonitorTable(shown, f"Matrices at step {step} (epoch {trainer.current_epoch})", whole))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._finish(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._finish(trainer)

    def forget(self) -> None:
        """Drop all measurements, at the start of a new run."""
        self.histories, self._tabled, self._vectors = {}, {}, {}

    def remember(self, step: int, measurements: Iterable[Measurement]) -> None:
        """Keep data that figures need besides the histories; for subclasses."""

    def figures(self) -> dict[str, Figure]:
        """Draw figures of the measurements, by tag: heat maps of the weights and of the updates, matrices by steps."""
        drawn: dict[str, Figure] = {}
        for kind in get_args(Kind):
            maps = [
                Map(self.key(q.key), q.label, self.histories[q.key], q.relative)
                for q in self.quantities
                if q.kind == kind and len(self.histories.get(q.key, ()))
            ]
            if maps:
                drawn[self.key(f"{self.name}_of_{kind}s")] = heat_maps(maps)
        return drawn

    def take_movements(self) -> list[Movement]:
        """Return the rows of the table, one per quantity measured since the last table, and count them as shown."""
        rows = []
        for quantity in self.quantities:
            history = self.histories.get(quantity.key)
            last = self._tabled.get(quantity.key)
            if not history or (last is not None and last["step"] == history.steps[-1]):
                continue
            step, values = history.steps[-1], history.row(-1)
            before, before_step = None, None
            if last is not None:
                before, before_step = last["values"], last["step"]
            elif len(history) > 1:  # the first table compares with the first measurement
                before, before_step = history.row(0), history.steps[0]
            rows.append(
                Movement(self.key(quantity.key), step, values, before, quantity.extreme, quantity.alarm, before_step)
            )
            self._tabled[quantity.key] = {"step": step, "values": values}
        return rows

    def key(self, name: str) -> str:
        """Return the key under which this instance logs a quantity."""
        return f"{self.prefix}{name}{self._suffix}"

    def watched_matrices(self) -> dict[str, tuple[int, int]]:
        """Return (m, n) of the matrices that are watched now, in the module's order, without frozen ones."""
        trained = [watched for watched in self._watched if watched.parameter.requires_grad]
        return {name: shape for watched in trained for name, shape in watched.shapes.items()}

    def demand(self, step: int) -> Plan:
        """Return what to measure after a step."""
        if not self.clock.due(step):
            return {}
        depths: dict[Kind, Depth] = {}
        for quantity in self.quantities:
            if quantity.depth < Depth.SPECTRUM or self.clock.due_spectrum(step):
                depths[quantity.kind] = max(quantity.depth, depths.get(quantity.kind, Depth.NORM))
        matrices = self.watched_matrices()
        small = [name for name, shape in matrices.items() if min(shape) <= self.max_spectrum_size]
        decomposed = set(evenly_chosen(small, self.max_spectra))
        return {
            (kind, name): min(depth, Depth.SPECTRUM if name in decomposed else Depth.GRAM)
            for kind, depth in depths.items()
            for name in matrices
        }

    def _values(self, quantity: Quantity, measurements: Iterable[Measurement], plan: Plan) -> dict[str, float]:
        """Return a quantity of the matrices for which this monitor planned it, in the module's order."""
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
        return {
            name: found[name]
            for (kind, name), depth in plan.items()
            if kind == quantity.kind and depth >= quantity.depth and name in found
        }

    def _share_probe(self, monitors: Sequence[SpectralMonitor]) -> None:
        """Give all monitors one probe, which watches the matrices of any of them; the last monitor calls this."""
        # Two monitors may have rules that read the same parameter differently.
        union = {(w.parameter, tuple(w.shapes)): w for monitor in monitors for w in monitor._watched}
        probe = MatrixProbe(list(union.values()), [monitor.demand for monitor in monitors])
        for monitor in monitors:
            probe.vectors.update(monitor._vectors)
            monitor._probe = probe

    def _warn_of_what_is_left_out(self, module: str) -> None:
        name = type(self).__name__
        if not self._watched:
            warn_of_no_matrix(name, module, chosen=bool(self.include or self.exclude))
        keys = [quantity.key for quantity in self.quantities if quantity.depth is Depth.SPECTRUM]
        if keys and self.clock.spectrum_interval:
            sizes = [min(shape) for watched in self._watched for shape in watched.shapes.values()]
            warn_of_limits(name, keys, sizes, self.max_spectrum_size, self.max_spectra)

    def _keep_vectors(self) -> None:
        if self._probe is not None:
            vectors = self._probe.vectors
            of_weights = any(quantity.kind == "weight" for quantity in self.quantities)
            names = [name for watched in self._watched if of_weights for name in watched.shapes]
            self._vectors = {name: vectors[name].cpu() for name in names if name in vectors}

    def _finish(self, trainer: Trainer) -> None:
        if self._probe is None:
            return
        if self._watched:
            missing = [quantity.key for quantity in self.quantities if quantity.key not in self.histories]
            warn_of_nothing(type(self).__name__, missing, self.histories, _step(trainer), self.clock)
        self._probe.close()
        self._keep_vectors()
        self._probe = None
        self._watched = []
        try:
            self._show(trainer)
        except Exception as error:  # must not end the fit, or hide its error
            rank_zero_warn(f"{type(self).__name__} could not show what it measured: {error}")

    @rank_zero_only
    def _show(self, trainer: Trainer) -> None:
        measured = {self.key(q.key): self.histories[q.key] for q in self.quantities if q.key in self.histories}
        if not measured or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        drawn: Mapping[str, Figure] = {}
        if self.plot and figures.figures_available():
            drawn = self.figures()
        elif self.plot and self is _monitors(trainer)[0]:
            rank_zero_warn("Figures of the spectral monitors need matplotlib: pip install matplotlib.")
        show_run(self.key(self.name), measured, drawn, trainer.loggers, self._directory)


def _step(trainer: Trainer) -> int:
    """Return the step of values that are logged now."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped  # as in Lightning's own LearningRateMonitor


def _monitors(trainer: Trainer) -> list[SpectralMonitor]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SpectralMonitor)]


@rank_zero_only
def _print(table: MonitorTable) -> None:
    print_table(table)
