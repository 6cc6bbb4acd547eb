"""From a command line to settings; help and errors in words."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Sequence
from inspect import cleandoc
from typing import Any, TypeVar

import tyro

from ferkd.errors import InputError

Settings = TypeVar("Settings")


@dataclasses.dataclass(frozen=True)
class Output:
    json: bool = False
    """Print the result as JSON on stdout."""
    debug: bool = False
    """On an error show where it came from."""


def parse(
    command: Callable[..., Any],
    settings: type[Settings],
    arguments: Sequence[str],
    name: str | None = None,
    default: Settings | None = None,
) -> tuple[Settings, Output]:
    """Settings and output flags from the command line. Nested dataclasses give plain flags: --discard-below, without --config.policy."""

    def both(settings, output=Output()):  # type: ignore[no-untyped-def]
        return settings, output

    both.__annotations__ = {"settings": settings, "output": Output}  # tyro reads them at run time
    if default is not None:
        both.__defaults__ = (default, Output())
    description, example = _help_of(command)
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed: tuple[Settings, Output] = tyro.cli(
                both, args=list(arguments), prog=f"ferkd {name or command.__name__}", description=description,
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
            )  # fmt: skip
    except SystemExit as stop:
        if stop.code == 0:  # it was --help: what is read last is a command to try
            print(example)
            raise
        raise InputError(_unboxed(box.getvalue())) from None
    return parsed


def choose(command: Callable[..., Any], formats: dict[str, Callable[[Sequence[str]], None]], arguments: Sequence[str]) -> None:
    """Runs the function of the format named first."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: ferkd {command.__name__} {{{','.join(formats)}}} ...\n\n" + "\n\n".join(_help_of(command)))
    elif not arguments or arguments[0] not in formats:
        raise InputError(f"{arguments[0] if arguments else 'no format'!r}: name the format first: {', '.join(formats)}")
    else:
        formats[arguments[0]](arguments[1:])


def _help_of(command: Callable[..., Any]) -> tuple[str, str]:
    """A command's docstring: what it does, and its example, which begins with `Example:`."""
    description, _, example = cleandoc(command.__doc__ or "").partition("\n\nExample:\n")
    return description, f"Example:\n{example}"


def _unboxed(text: str) -> str:
    """The words of an error that tyro framed for the terminal."""
    lines = [line.strip("╭╮╰╯│┌┐└┘─ ") for line in text.splitlines()]
    words = " ".join(line for line in lines if line.strip("-"))
    words = re.sub(r"^Value error Error parsing (settings[.\w]*: )?", "", words)
    words = re.sub(r"^(Unrecognized options|Missing argument|Invalid choice|Required options) (?=\w)", "", words)
    words, explains = re.sub(r"\.?\s*For full helptext, (?:see|run):? (.*--help)$", r"; \1 explains", words).rpartition("; ")[::2]
    if missing := re.match(r"Missing from [\w -]*: (.*)", words):
        words = ", ".join(re.findall(r"(?:^|\(required\) )(\S+)", missing[1])) + ": missing"
    words, _, near = words.removesuffix(".").partition(" Perhaps you meant: ")
    words = words.partition(" Argument helptext: ")[0]
    flags = re.findall(r"(--[a-z][\w-]*) (?:\{|[A-Z])", near)[:3]
    return f"{words}; {'did you mean ' + ' or '.join(flags) + '? ' if flags else ''}{explains}"


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of one flag, read before the others because they take their defaults from it."""
    for place, argument in enumerate(arguments):
        if argument == flag and place + 1 < len(arguments):
            return arguments[place + 1]
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "=")
    return None


def with_value(arguments: Sequence[str], flag: str, value: str) -> list[str]:
    """The same with a value after a flag that stands alone."""
    result: list[str] = []
    for argument, following in zip(arguments, [*arguments[1:], "--"], strict=True):
        result += [argument, value] if argument == flag and following.startswith("--") else [argument]
    return result
