"""What the command lines of the examples do with configs: name runs, and refuse an order that undoes one of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch.cli import ArgsType, LightningArgumentParser

from lightning_muon import MuonCLI
from lightning_muon.command_line import MuonArgumentParser

UNNAMED = "lightning_logs"
"""The name that loggers of Lightning have unless one is given."""


class RunParser(MuonArgumentParser):
    """:class:`MuonArgumentParser` that shows and saves configs with the name of the run."""

    @staticmethod
    def run_name(settings: Namespace) -> str:
        """What to call a run with these settings."""
        raise NotImplementedError

    def dump(self, cfg: Namespace, *args: Any, **kwargs: Any) -> str:
        cfg = cfg.clone()
        for section in (cfg, *(cfg[name] for name in self._subcommands() if name in cfg)):
            if "trainer" in section:
                name_loggers(section, self.run_name(section))
        return super().dump(cfg, *args, **kwargs)


class RunCLI(MuonCLI):
    """:class:`MuonCLI` whose runs have names, and folders of these names; its parser is a :class:`RunParser`."""

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        super().parse_arguments(parser, args)
        settings = settings_of(self.config)
        files = [Path(str(file)) for file in settings.get("config") or [] if file is not None]
        if sentence := fault_in_order(file for file in files if file.is_file()):
            parser.error(sentence)
        if isinstance(parser, RunParser):
            name_loggers(settings, parser.run_name(settings))


def settings_of(config: Namespace) -> Namespace:
    """The settings of the subcommand; those at the top where there is none."""
    settings: Namespace = config.get(config.get("subcommand") or "", config)
    return settings


def name_loggers(settings: Namespace, name: str) -> None:
    """Give loggers this name where the user gave them none."""
    loggers = settings.trainer.get("logger")
    for logger in loggers if isinstance(loggers, list) else [loggers]:
        arguments = logger.get("init_args", {}) if isinstance(logger, Namespace) else {}
        if arguments.get("name") == UNNAMED:
            arguments["name"] = name


def fault_in_order(files: Iterable[Path]) -> str | None:
    """A sentence where a config that chooses model or data undoes what one before it changed; else None."""
    changed: dict[str, tuple[Any, Path]] = {}
    for file in files:
        settings = dict(_flat(yaml.safe_load(file.read_text(encoding="utf-8")) or {}))
        if not {"model.class_path", "data.class_path"} & settings.keys():
            changed |= {key: (value, file) for key, value in settings.items()}
            continue
        for key in filter(changed.__contains__, settings):
            value, piece = changed[key]
            if settings[key] != value:
                return f"{file} would undo {key} of {piece}: give the files that choose model and data first."
    return None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by their dotted keys; what is appended to a list counts as the list."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key.removesuffix('+')}", value
