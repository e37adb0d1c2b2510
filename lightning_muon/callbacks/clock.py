"""Clock: after which steps to measure."""

from __future__ import annotations


class Clock:
    """Two intervals in optimizer steps, which are counted from 0.

    Args:
        interval: every so many steps something is measured.
        spectrum_interval: every so many steps all singular values are; a multiple of ``interval``, 0 for never.
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
        return self._strikes_spectrum(step if self._overdue is None else self._overdue)

    def postpone(self, step: int) -> None:
        """Stay due: no optimizer stepped, as happens in manual optimization."""
        if self._overdue is None or self._strikes_spectrum(step):
            self._overdue = step

    def measured(self) -> None:
        """Nothing is overdue any more."""
        self._overdue = None

    def _strikes_spectrum(self, step: int) -> bool:
        return self.spectrum_interval > 0 and (step + 1) % self.spectrum_interval == 0
