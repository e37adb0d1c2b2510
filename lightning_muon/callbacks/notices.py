"""Warnings of monitors about matrices and quantities that they do not measure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from lightning.pytorch.utilities import rank_zero_warn

from lightning_muon.callbacks.clock import Clock


def warn_of_no_matrix(monitor: str, module: str, chosen: bool) -> None:
    """Warn that a monitor watches no matrix.

    Args:
        monitor: name of the monitor's class.
        module: name of the module's class.
        chosen: whether ``include`` or ``exclude`` was given.
    """
    why = "include and exclude leave nothing" if chosen else f"{module} has no hidden matrix"
    rank_zero_warn(f"{monitor} watches nothing: {why}.")


def warn_of_limits(monitor: str, keys: Sequence[str], sizes: Sequence[int], max_size: int, max_count: int) -> None:
    """Warn if not all matrices will be decomposed.

    Args:
        monitor: name of the monitor's class.
        keys: quantities that need the decomposition.
        sizes: smaller side of each matrix.
        max_size: largest size that is decomposed.
        max_count: largest number of matrices that are decomposed.
    """
    count = min(sum(size <= max_size for size in sizes), max_count)
    if count < len(sizes):
        rank_zero_warn(
            f"{monitor} has {', '.join(keys)} of {count} of {len(sizes)} matrices, because decompositions are slow. "
            f"Raise max_spectra={max_count} and max_spectrum_size={max_size} (the largest matrix has {max(sizes)}) to "
            "include the others."
        )


def warn_of_nothing(monitor: str, missing: Sequence[str], measured: Collection[str], steps: int, clock: Clock) -> None:
    """Warn if a run ended without a measurement of some quantity.

    Args:
        monitor: name of the monitor's class.
        missing: keys without a value.
        measured: keys with values.
        steps: optimizer steps of the run.
        clock: the monitor's clock.
    """
    if not missing or not steps or (measured and not clock.spectrum_interval):
        return
    if measured:
        why = f"spectrum_every_n_steps is {clock.spectrum_interval}"
    elif steps < clock.interval:
        why = f"every_n_steps is {clock.interval}"
    else:
        why = (
            "it sees steps of self.optimizers(), but not those with use_pl_optimizer=False and not those that mixed "
            "precision skipped"
        )
    rank_zero_warn(f"{monitor} has no {', '.join(missing)} of this run of {steps} steps: {why}.")
