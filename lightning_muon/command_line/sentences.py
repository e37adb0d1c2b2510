"""Explains errors of a command line in a few lines: the cause and similar names, without usage and nested unions."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import extract_tb

from lightning.pytorch import LightningDataModule, LightningModule

from lightning_muon.command_line import names
from lightning_muon.command_line.report import Problem, read_report

PLAIN_OPTIONS = ("optimizer", "lr_scheduler")
"""Options of a plain ``LightningCLI`` that ``MuonCLI`` does without."""

MAX_LINES = 6
"""Maximum lines of an explanation; at most two lines are printed around it."""


def explain(report: str, parser: argparse.ArgumentParser, error: BaseException | None = None) -> str:
    """Explain an error and suggest similar names, in at most :data:`MAX_LINES` lines.

    Args:
        report: the message of jsonargparse.
        parser: the parser of the subcommand, whose options are offered.
        error: the exception behind the report; its causes have the file and line of a failed import.
    """
    problem = read_report(report)
    sentence = _failed_import(problem, error)
    if sentence is None and problem.key in PLAIN_OPTIONS:
        sentence = _no_plain_option(problem.key, parser)
    if sentence is None and problem.expected:
        sentence = _wrong_value(problem)
    for pattern, describe in _KINDS:
        if sentence is None and (found := re.fullmatch(pattern, problem.text, re.DOTALL)):
            sentence = describe(problem, found, parser)
    if sentence is None:
        sentence = _at(problem) + problem.text
    lines = [line if len(line) <= 700 else f"{line[:700]}..." for line in sentence.splitlines() if line.strip()]
    return "\n".join(lines[:MAX_LINES])


def _no_subcommand(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    known = re.findall(r"\w+", found[2])
    return f"No subcommand {found[1]!r}.{names.did_you_mean(found[1], known, list_few=True)}"


def _subcommand_missing(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    return f"A subcommand is missing: {names.either(found[1].split(','))}."


def _unknown_options(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    options = [word.partition("=")[0] for word in found[1].split() if word.startswith("-")]
    if not options:
        return f"Unexpected: {found[1]}. Options begin with '--'."
    more = [f"There are {len(options) - 4} more."] if len(options) > 5 else []
    shown = options[:4] if more else options
    return "\n".join([*(f"No option {option!r}.{_near_options(option, parser)}" for option in shown), *more])


def _unknown_argument(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    name = found[1]
    if problem.owner is None:
        near = _near_options(f"--{name}", parser).replace("--", "")
        return f"No setting {name!r}.{near}"
    part = name.split(".")[0]
    if part == "class_path":
        return (
            f"{_at(problem)}Only init_args and dict_kwargs may stand beside class_path: put the rest under init_args."
        )
    if meant := names.near(part, ("class_path", "init_args", "dict_kwargs")):
        return f"{_at(problem)}No key {part!r}. Did you mean {meant[0]}?"
    if names.resolve(problem.owner) in (LightningModule, LightningDataModule):
        return _module_without_class(problem.key, name)
    near = names.did_you_mean(name, names.arguments(problem.owner), list_few=True)
    # Perhaps the base class, and no subclass was chosen.
    if names.resolve(problem.owner) in problem.kinds and "Did you mean" not in near:
        near += f" An argument of a subclass needs its class before it: --{problem.key} CLASS, or a config that has it."
    return f"{_at(problem)}{problem.owner} has no argument {name!r}.{near}"


def _module_without_class(key: str, name: str) -> str:
    return (
        f"{key}.{name} is given without the class of the {key}. Give --{key} CLASS, or in a config "
        f"`{key}: {{class_path: CLASS, init_args: {{{name}: ...}}}}`.\n"
        "If this config is of a main.py with LightningCLI(MyModel, ...), change one word in main.py: LightningCLI to "
        "MuonCLI (from lightning_muon import MuonCLI). Then `python main.py fit --config ...` takes it as it is."
    )


def _no_class(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    name, known = found[1], names.subclasses(problem.kinds)
    near = names.did_you_mean(name, known, list_few=True)
    if path := names.experimental(name):
        near = f" Did you mean {path}?"
    own = "" if "Did you mean" in near else " A class of your own is given by its path, as in my_package.MyClass."
    return f"{_at(problem)}No {names.noun(problem.kinds)} {name!r}.{near}{own}"


def _no_member(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    module, name = found[1], found[2]
    last = any((given or "").endswith(f".{name}") for given in (problem.owner, problem.value))
    what = names.noun(problem.kinds) if last else "module"
    known = names.members(module, problem.kinds) if last else names.submodules(module)
    near = names.did_you_mean(name, known, prefix=f"{module}.")
    return f"{_at(problem)}No {what} {name!r} in {module}.{near}"


def _no_module(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str | None:
    missing = found[1]
    parent, _, name = missing.rpartition(".")
    near = names.did_you_mean(name, names.submodules(parent), prefix=f"{parent}." if parent else "")
    return f"{_at(problem)}No module {missing!r}, in the current directory or installed.{near}"


def _several_classes(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    return f"{_at(problem)}{found[1]} is the name of several classes. Give one by its path: {found[2]}."


def _wrong_base(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    path = found[1] or problem.owner or problem.value or ""
    cls = names.resolve(path)
    if isinstance(cls, type) and (sentence := names.other_namespace(cls)):
        return _at(problem) + sentence
    base = problem.kinds[0].__name__ if problem.kinds else found[2]
    return f"{_at(problem)}{path or problem.value} is no {names.noun(problem.kinds)}: it is not a subclass of {base}."


def _class_needed(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    known = names.subclasses(problem.kinds)
    if not known:
        return f"{_at(problem)}{found[1]} is abstract. Give a subclass of it."
    there_are = f" There are {', '.join(known)}." if len(known) <= 25 else ""
    return f"{problem.key} needs a class before its arguments, as in --{problem.key} {known[0]}.{there_are}"


def _required(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    subcommand = parser.prog.split()[-1]
    keys = [".".join(filter(None, (problem.key, key.removeprefix(f"{subcommand}.")))) for key in found[1].split(", ")]
    options = [f"--{key} CLASS" if key in ("model", "data") else f"--{key} VALUE" for key in keys]
    needs = f"{problem.owner} needs" if problem.owner else "Needed:"
    return (
        f"{needs} {', '.join(keys)}. Give {' '.join(options)}, or set {'it' if len(keys) == 1 else 'them'} in a config."
    )


def _no_file(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    path = Path(found[1])
    if path.is_dir():
        return f"{str(path)!r} is a folder, not a config file."
    if not path.parent.is_dir():
        return f"No config file {str(path)!r}, and no folder {str(path.parent)!r}."
    beside = [other.name for other in path.parent.iterdir() if other.is_file()]
    near = [str(path.with_name(name)) for name in names.near(path.name, beside)]
    return f"No config file {str(path)!r}.{' Did you mean ' + names.either(near) + '?' if near else ''}"


def _no_yaml(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    text = re.sub(r'\s*in "<unicode string>",', " at", found[1])
    return f"A config is not valid YAML: {' '.join(text.split())}."


def _no_settings(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    begin = found[1].strip().splitlines()[:1]
    return f"A config must hold settings, as in `trainer: {{max_epochs: 3}}`. This one begins with {begin[0]!r}."


def _wrong_type(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    if found[1] in PLAIN_OPTIONS:
        return _no_plain_option(found[1], parser)
    return f"--{found[1]} must be of type {found[2]}, got {found[3]}."


def _no_value(problem: Problem, found: re.Match[str], parser: argparse.ArgumentParser) -> str:
    return f"{found[1].split('/')[0]} needs a value."


def _wrong_value(problem: Problem) -> str:
    given = problem.value if problem.value is not None else "nothing"
    literals = [choice for choice in problem.expected if choice.isdigit() or choice[0] in "'\""]
    if not literals:
        return f"{problem.key} must be of type {names.either(problem.expected)}, got {given!r}."
    choices = [choice.strip("'\"") for choice in literals]
    return f"{problem.key} must be one of {', '.join(choices)}, got {given!r}.{names.did_you_mean(given, choices)}"


def _failed_import(problem: Problem, error: BaseException | None) -> str | None:
    """Return the error from importing the module of a class, if that caused the report."""
    while error is not None:
        frames = extract_tb(error.__traceback__)
        executed = any(frame.name == "<module>" for frame in frames)
        if executed or isinstance(error, SyntaxError):
            given = re.search(r"class_path'?[:=] ?'([^']*)'", problem.value or "")
            path = problem.owner or (given[1] if given else problem.value) or "The module"
            place = "" if isinstance(error, SyntaxError) else f" ({frames[-1].filename}, line {frames[-1].lineno})"
            return f"{_at(problem)}{path} cannot be imported.\n{type(error).__name__}: {error}{place}"
        error = error.__cause__ or error.__context__
    return None


def _at(problem: Problem) -> str:
    return f"{problem.key}: " if problem.key else ""


def _near_options(word: str, parser: argparse.ArgumentParser) -> str:
    known = list(_options(parser))
    if word.removeprefix("--").split(".")[0] in PLAIN_OPTIONS:
        return f" {_instead(word, parser)}"
    found = names.near_dotted(word, known)
    return f" Did you mean {names.either(found)}?" if found else ""


def _no_plain_option(name: str, parser: argparse.ArgumentParser) -> str:
    return f"No option '--{name}'. {_instead(name, parser)}"


def _instead(word: str, parser: argparse.ArgumentParser) -> str:
    """Name the options of MuonCLI to use instead of an option of a plain LightningCLI."""
    ends = ("schedule",) if "lr_scheduler" in word else ("matrix_optimizer", "other_optimizer")
    ours = [option for option in _options(parser) if option.endswith(ends)]
    ours = [option for option in ours if option.startswith("--model.")] or ours or [f"--model.{end}" for end in ends]
    return f"A plain LightningCLI has it; use {names.either(ours)} instead."


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Yield the options of a parser and common arguments of optimizers, without options that show help or append."""
    for action in parser._actions:
        for option in action.option_strings if action.help != argparse.SUPPRESS else ():
            if option.startswith("--") and not option.endswith((".help", "+")):
                yield option
                if option.endswith(("matrix_optimizer", "other_optimizer")):
                    yield from (f"{option}.lr", f"{option}.weight_decay")


_KINDS: tuple[tuple[str, Callable[[Problem, re.Match[str], argparse.ArgumentParser], str | None]], ...] = (
    (r"argument subcommand: invalid choice: '(.*?)' \(choose from (.*)\)", _no_subcommand),
    (r'expected "subcommand" to be one of \{(.*)\}, but it was not provided\.', _subcommand_missing),
    (r"[Uu]nrecognized arguments: (.*)", _unknown_options),
    (r"(?:Option|Key) '([^']*)' is not (?:accepted|expected).*", _unknown_argument),
    (r"(?:Subcommand|Group) '[^']*' does not accept (?:option|nested key) '([^']*)'", _unknown_argument),
    (r"Expected a dot import path string: (.*)", _no_class),
    (r"module '([^']*)' has no attribute '([^']*)'", _no_member),
    (r"No module named '([^']*)'.*", _no_module),
    (r"Multiple subclasses with name (\w+)\..*ambiguity: (.*)\.", _several_classes),
    (r"Import path ?(\S*) does not correspond to a subclass of (\w+).*", _wrong_base),
    (r"Expected '([^']*)' to be a (?:subclass of|class that instantiates into) (.*)\.", _wrong_base),
    (r"Expected an instantiatable class, but (\S+) is abstract", _class_needed),
    (r"Not a valid subclass of (\w+)\b.*", _class_needed),
    (r"the following arguments are required: (.*)", _required),
    (r'Key "([^"]*)" is required but .*', _required),
    (r"File does not exist: '(.*)'", _no_file),
    (r"Path is not a file: '(.*)'", _no_file),
    (r"Problems parsing config: (.*)", _no_yaml),
    (r"Unexpected config: (.*)", _no_settings),
    (r"argument (\S+): expected one argument", _no_value),
    (r"argument --(\S+): invalid (\w+) value: (.*)", _wrong_type),
)
