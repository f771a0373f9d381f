"""What all commands share: flags, reading a config from file and command line, ending with one sentence."""

import argparse
import dataclasses
import difflib
import importlib.util
import os
import re
import sys
import textwrap
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import PositiveInt

from jaxplain.errors import JaxplainError, Stopped
from jaxplain.guide import COMMANDS, epilog, program

Config = TypeVar("Config")

EXIT_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: the same command goes on
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141

TRACEBACK, QUIET, JSON = "--traceback", "--quiet", "--json"
_SHARED = {
    QUIET: "Say nothing but errors and warnings, and show no progress bars.",
    JSON: "Print one JSON object with what came of it instead of text.",
    TRACEBACK: "Show where an error came from.",
}
_FLAGS: set[str] = set()

_UNKNOWN_KEY = re.compile(r"(?:does not accept option|Option|unrecognized arguments:) '?(?:--)?([\w.]+)")


def run(main: Callable[[Sequence[str]], None], *, leave: Callable[[int], object] = sys.exit) -> None:
    """Run a command's main function and exit: errors end in one sentence and status 2, SIGTERM in status 75.

    `--traceback` shows where an error came from. `leave` ends the process with the status of an error.
    """
    arguments = [argument for argument in sys.argv[1:] if argument != TRACEBACK]
    try:
        main(arguments)
    except JaxplainError as error:
        if TRACEBACK in sys.argv[1:]:
            raise
        if str(error):
            print(f"error: {error}", file=sys.stderr, flush=True)
        leave(EXIT_ERROR)
    except Stopped as stopped:
        if str(stopped):
            print(stopped, file=sys.stderr, flush=True)
        os._exit(EXIT_STOPPED)
    except BrokenPipeError:
        # Whoever read the output, such as head, has seen enough; Python must not write at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BROKEN_PIPE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        # Not sys.exit: taking threads of XLA and Grain down in the middle of their work can crash.
        os._exit(EXIT_INTERRUPTED)


def require_plots() -> None:
    """Raise JaxplainError where the packages that draw and log are missing; asked before any work is done."""
    for package in ("matplotlib", "tensorboardX"):
        if importlib.util.find_spec(package) is None:
            raise JaxplainError(
                f"this command needs the package {package}; install it with pip install 'jaxplain[plots]'."
            )


class PlainParser(argparse.ArgumentParser):
    """A parser for a command without a config. What it cannot parse is a JaxplainError."""

    def __init__(self, command: str, *, more: Sequence[str] = ()):
        super().__init__(
            prog=program(command),
            description=COMMANDS[command].does,
            epilog="\n".join([*more, epilog(command)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        for flag, description in _SHARED.items():
            self.add_argument(flag, action="store_true", help=description)

    def error(self, message: str) -> NoReturn:
        """Raise it."""
        raise JaxplainError(f"{message}; see --help.")


def config_parser(config_class: type, command: str) -> ArgumentParser:
    """A parser of `--config FILE` and `--any.field value` for a command's config dataclass."""
    parser = ArgumentParser(
        prog=program(command),
        usage=f"{program(command)} --config FILE [--any.field VALUE ...] [other options]",
        description=COMMANDS[command].does,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
    )
    parser.epilog = "\n".join([*_describe_list_items(config_class), epilog(command)])
    parser.add_argument("--config", action="config", help="A YAML file with any of the fields below.")
    for flag, description in _SHARED.items():
        add_flag(parser, flag, description)
    parser.add_class_arguments(config_class, as_group=False)
    return parser


class _HelpFormatter(DefaultHelpFormatter):
    """Leaves the lines of the epilog as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in text.splitlines())


def add_flag(parser: ArgumentParser, flag: str, description: str) -> None:
    """Add a switch that is given on the command line, and never in a config file."""
    _FLAGS.add(flag)
    parser.add_argument(flag, action="store_true", help=description)


def add_count(parser: ArgumentParser, flag: str, description: str) -> None:
    """Add an option with a number from 1 that is given on the command line, and never in a config file."""
    _FLAGS.add(flag)
    parser.add_argument(flag, type=PositiveInt, metavar="N", help=description)


def parse_config(
    parser: ArgumentParser, config_class: type[Config], arguments: Sequence[str]
) -> tuple[Config, Any]:
    """The config, and the other options that the parser was given.

    `--quiet` stands for no progress bars either, whatever the config says.

    Raises JaxplainError for an unknown key (with the nearest known one), a wrong type or value.
    """
    bars = [path for path in _known_keys(config_class) if path.split(".")[-1] == "progress"]
    without = [f"--{path}=false" for path in bars if QUIET in arguments]
    try:
        namespace = parser.parse_args([*arguments, *without])
        values = parser.instantiate(namespace)
    except ArgumentError as error:
        raise JaxplainError(_one_sentence(str(error), config_class)) from error
    except UnicodeDecodeError as error:
        raise JaxplainError(f"the config file is not UTF-8 text: {error}.") from error
    for flag in _FLAGS:
        given = any(argument.split("=")[0] == flag for argument in arguments)
        if values.get(flag.removeprefix("--").replace("-", "_")) and not given:
            raise JaxplainError(f"{flag} is for the command line; take it out of the config file.")
    fields = typing.get_type_hints(config_class)
    return config_class(**{name: values[name] for name in fields}), values


def _one_sentence(message: str, config_class: type) -> str:
    if match := _UNKNOWN_KEY.search(message):
        key = match[1]
        known = list(_known_keys(config_class))
        # A key within a list item is reported without its block, so compare last parts too.
        last_parts = {path.rsplit(".", 1)[-1]: path for path in reversed(known)}
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        close_parts = difflib.get_close_matches(key.rsplit(".", 1)[-1], last_parts, n=1, cutoff=0.5)
        nearest = close[0] if close else last_parts[close_parts[0]] if close_parts else None
        suggestion = f"; did you mean {nearest}?" if nearest else "; see --help for the known ones."
        return f"unknown config key {key}{suggestion}"
    lines = [line.strip().removesuffix(":") for line in message.strip().splitlines()]
    text = ": ".join(dict.fromkeys(line for line in lines if line))
    text = re.sub(r'Parser key "([\w.]+)"', r"config key \1", text)
    text = re.sub(r"<class '(\w+)'>", r"\1", text).replace("typing.Literal", "one of ")
    return text.rstrip(".") + "."


def _known_keys(config_class: Any, prefix: str = "") -> Iterator[str]:
    for name, kind in typing.get_type_hints(config_class).items():
        inner = next((t for t in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(t)), None)
        if inner is None:
            yield prefix + name
        else:
            yield from _known_keys(inner, f"{prefix}{name}.")


def _describe_list_items(config_class: Any, prefix: str = "") -> Iterator[str]:
    """Help for the fields of blocks that stand in lists, which the parser itself does not describe."""
    for name, kind in typing.get_type_hints(config_class).items():
        if dataclasses.is_dataclass(kind):
            yield from _describe_list_items(kind, f"{prefix}{name}.")
        for item in typing.get_args(kind):
            if dataclasses.is_dataclass(item):
                yield f"each of {prefix}{name}:"
                yield textwrap.dedent((item.__doc__ or "").split("Args:")[1]).strip("\n")
                yield f"    defaults: {_defaults(item)}"


def _defaults(config_class: Any) -> str:
    return ", ".join(
        f"{field.name} {field.default}"
        for field in dataclasses.fields(config_class)
        if field.default is not dataclasses.MISSING
    )
