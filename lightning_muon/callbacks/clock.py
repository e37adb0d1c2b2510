"""Clock: after which steps to measure."""

from __future__ import annotations


class Clock:
    """Two intervals in optimizer steps, which are counted from 0.

    Args:
        interval: steps between two measurements.
        spectrum_interval: steps between two computations of all singular values: a multiple of ``interval``, or 0 for
            never.
    """

    def __init__(self, interval: int, spectrum_interval: int) -> None:
        self.interval = interval
        self.spectrum_interval = spectrum_interval
        self._overdue: int | None = None

    def due(self, step: int) -> bool:
        """Whether to measure after this step."""
        return (step + 1) % self.interval == 0 or self._overdue is not None

    def due_spectrum(self, step: int) -> bool:
        """Whether to compute all singular values after this step."""
        return self._is_spectrum_step(step if self._overdue is None else self._overdue)

    def postpone(self, step: int) -> None:
        """Stay due after a batch without an optimizer step, as in manual optimization."""
        if self._overdue is None or self._is_spectrum_step(step):
            self._overdue = step

    def measured(self) -> None:
        """Forget what is overdue."""
        self._overdue = None

    def _is_spectrum_step(self, step: int) -> bool:
        return self.spectrum_interval > 0 and (step + 1) % self.spectrum_interval == 0
