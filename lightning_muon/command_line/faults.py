"""Short errors during the setup of a run: one sentence on the command line, without a traceback."""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType, TracebackType

from lightning_muon.command_line.parser import debugging
from lightning_muon.command_line.report import read_report

_THROUGH = ("lightning", "lightning_fabric", "lightning_utilities", "jsonargparse", "torch")
"""Packages whose frames may lie on the way to the error, besides the standard library."""


@contextmanager
def short_faults(packages: Sequence[str], ends: bool) -> Iterator[None]:
    """Raise errors of constructors without the errors of jsonargparse around them.

    Args:
        packages: dotted names of packages that check their arguments.
        ends: print errors that these packages raise as one ``error: ...``, and end with exit code 1. All other errors
            keep their traceback, which shows errors in the user's own code.
    """
    try:
        yield
    except Exception as error:
        if debugging():
            raise
        cause = _without_layers(error)
        if ends and _is_refusal(cause, packages):
            sys.stderr.write(f"error: {cause}\nLIGHTNING_MUON_FULL_ERRORS=1 shows the traceback.\n")
            raise SystemExit(1) from cause
        if cause is error:
            raise
        raise cause from cause.__cause__


def _without_layers(error: Exception) -> Exception:
    """Return the error that was raised first, if jsonargparse only passed it on."""
    found: BaseException = error
    while _package(_frames(found.__traceback__)[-1][0]).startswith("jsonargparse") and found.__cause__ is not None:
        found = found.__cause__
    if found is error or not isinstance(found, Exception):
        return error
    if _package(_frames(found.__traceback__)[-1][0]).startswith("jsonargparse"):
        return ValueError(read_report(str(error)).text)  # the causes keep only the first member of a Union
    return found


def _is_refusal(error: Exception, packages: Sequence[str]) -> bool:
    """Whether a ``raise`` in one of the packages made the error, with no code of the user on the way to it."""
    frames = _frames(error.__traceback__)
    last, instruction = frames[-1]
    allowed = (*packages, *_THROUGH)
    through = all(
        _within(_package(frame), allowed) or _package(frame).split(".")[0] in sys.stdlib_module_names - {"__main__"}
        for frame, _ in frames
    )
    return through and _within(_package(last), packages) and _is_raise(last.f_code, instruction)


def _frames(traceback: TracebackType | None) -> list[tuple[FrameType, int]]:
    frames = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lasti))
        traceback = traceback.tb_next
    return frames


def _package(frame: FrameType) -> str:
    return frame.f_globals.get("__package__") or frame.f_globals.get("__name__") or ""


def _within(package: str, others: Sequence[str]) -> bool:
    return any(f"{package}.".startswith(f"{other}.") for other in others)


def _is_raise(code: CodeType, instruction: int) -> bool:
    return dis.opname[code.co_code[instruction]] == "RAISE_VARARGS"
