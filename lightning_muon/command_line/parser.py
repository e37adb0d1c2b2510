"""The parser of :class:`lightning_muon.MuonCLI`: short errors, our options first, no setting shown twice."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import Any, NoReturn

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from lightning_muon.command_line.sentences import PLAIN_OPTIONS, explain

SETTINGS_HELP = {
    "matrix_optimizer": "Optimizer of the hidden matrices; Muon unless given. Arguments without a class, as in "
    "--%s.lr 3e-3, are Muon's.",
    "other_optimizer": "Optimizer of all other parameters; AdamW unless given. Arguments without a class, as in "
    "--%s.lr 3e-3, are AdamW's.",
    "schedule": "Multiplier of all learning rates; constant unless given.",
    "parameter_rules": "Rules that override the automatic partition: group, layout and options of parameters.",
}
"""Help of :data:`~lightning_muon.mixin.SETTINGS`; ``%s`` stands for the option."""


_NO_OPTIMIZER_ARGUMENTS = (
    "MuonCLI has --matrix_optimizer, --other_optimizer and --schedule (under --model. for a module with MuonMixin) in "
    "place of those that parser.{method} adds. Remove this call from add_arguments_to_parser."
)


class MuonArgumentParser(LightningArgumentParser):
    """``LightningArgumentParser`` with errors of at most eight lines: the cause and similar names.

    Options are not abbreviated, so that a wrong one is never taken for another. With the environment variable
    ``LIGHTNING_MUON_FULL_ERRORS=1`` the whole report of jsonargparse is printed.
    """

    def __init__(self, *args: Any, allow_abbrev: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **kwargs)

    def add_plain_options(self) -> None:
        """Accepts ``optimizer: null`` and ``lr_scheduler: null``, which every config of a plain LightningCLI has."""
        for name in PLAIN_OPTIONS:
            self.add_argument(f"--{name}", type=type(None), default=None, help=argparse.SUPPRESS)

    def add_optimizer_args(self, *args: Any, **kwargs: Any) -> None:
        """Raises ``TypeError``: MuonCLI has ``--matrix_optimizer`` and ``--other_optimizer``."""
        raise TypeError(_NO_OPTIMIZER_ARGUMENTS.format(method="add_optimizer_args"))

    def add_lr_scheduler_args(self, *args: Any, **kwargs: Any) -> None:
        """Raises ``TypeError``: MuonCLI has ``--schedule``."""
        raise TypeError(_NO_OPTIMIZER_ARGUMENTS.format(method="add_lr_scheduler_args"))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints what is wrong and ends with exit code 2."""
        if not self.exit_on_error or debugging():
            super().error(message, ex)
        parser = self._of_subcommand(message)
        program = parser.prog.replace(" [options]", "")
        try:
            explanation = explain(message, parser, ex)
        except Exception:  # a report that is not understood is better than none
            explanation = message[:500]
        sys.stderr.write(
            f"error: {explanation}\n"
            f"`{program} --help` shows the options; LIGHTNING_MUON_FULL_ERRORS=1 shows the whole report.\n"
        )
        self.exit(2)

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        """As in jsonargparse, without the settings for modules without the mixin if the model has them itself."""
        cfg = cfg.clone()
        for section in (cfg, *(cfg[name] for name in self._subcommands() if name in cfg)):
            model = section.get("model") or {}
            of_model = model.get("init_args", model) if isinstance(model, (dict, Namespace)) else {}
            for name in SETTINGS_HELP:
                if name in section and section[name] is None and name in (of_model or {}):
                    del section[name]
        dumped: str = super().dump(cfg, *args, **kwargs)
        return dumped

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Help with the model, the data and the optimizers before the Trainer, without Sphinx markup."""
        groups, usage = self._action_groups, self.usage
        if usage is None and not self._subcommands():  # 40 lines of Trainer options otherwise
            self.usage = f"{self.prog.replace(' [options]', '')} [options]"
        self._action_groups = sorted(groups, key=lambda group: group.title == TRAINER_TITLE)
        for action in self._actions:
            if _setting(action.dest) in SETTINGS_HELP and action.help is not argparse.SUPPRESS:
                action.help = setting_help(action.dest)
        try:
            return _plain(super().format_help(*args, **kwargs))
        finally:
            self._action_groups, self.usage = groups, usage

    def _of_subcommand(self, message: str) -> argparse.ArgumentParser:
        """The parser of the subcommand that the message or the arguments name, or this one."""
        parsers = self._subcommands()
        words = [*re.findall(r"^Subcommand '(\w+)'", message), *getattr(self, "args", ())]
        return next((parsers[word] for word in words if word in parsers), self)

    def _subcommands(self) -> dict[str, argparse.ArgumentParser]:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}


TRAINER_TITLE = "Trainer"


def setting_help(option: str) -> str:
    """Help of a setting, by its option without the dashes: ``schedule`` or ``model.schedule``."""
    return SETTINGS_HELP[_setting(option)].replace("%s", option)


def debugging() -> bool:
    """Whether errors are to be shown in full."""
    names = ("LIGHTNING_MUON_FULL_ERRORS", "JSONARGPARSE_DEBUG")
    return any(os.environ.get(name, "").lower() not in ("", "0", "false") for name in names)


def _setting(option: str) -> str:
    return option.rpartition(".")[2]


def _plain(text: str) -> str:
    """``:class:`x``` and ````x```` as x."""
    return re.sub(r":\w+:`~?([^`<]+?)(?:\s*<[^`]*>)?`|``([^`]+)``", lambda found: found[1] or found[2], text)
