"""A command line is compared with the signature of its command before anything is done.

Fire, which shows the help, would run a command before it meets a misspelt flag, would take the word after a switch for
its value, would make a number of a file called 12, and takes as long to import as half of numpy.
"""

import inspect
import os
import sys
import textwrap
from collections.abc import Callable, Mapping
from keyword import iskeyword
from math import isfinite, nan
from typing import Any

from grow.errors import UserError, one_line, unknown
from grow.parts.part import Field

_HELP = ("-h", "--help")


def checked(
    arguments: list[str], commands: Mapping[str, Callable[..., Any]]
) -> tuple[str, list[str], dict[str, str | bool]]:
    """Returns a command's name, and its arguments by place and by name; {"help": True} if help is asked for.

    A command whose signature ends in **fields takes the fields of a recipe as flags too. Raises UserError, one line,
    for arguments that do not fit.
    """
    if not arguments or arguments[0] in _HELP:
        return "", [], {"help": True}
    if arguments == ["--version"]:
        return "", [], {"version": True}
    name, *rest = arguments
    if name not in commands:
        raise UserError(unknown(name, commands, "command"))
    if any(argument in _HELP for argument in rest):
        return name, [], {"help": True}
    parameters = inspect.signature(commands[name]).parameters
    positional, flags = _split(name, rest, parameters)
    _complete(name, positional, flags, parameters)
    words = iter(positional)
    first = [str(flags.pop(key) if key in flags else next(words)) for key in _needed(parameters)]
    return name, [*first, *words], flags


def _split(name: str, rest: list[str], parameters: Mapping[str, Any]) -> tuple[list[str], dict[str, str | bool]]:
    positional: list[str] = []
    flags: dict[str, str | bool] = {}
    words = list(rest)
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word == "-" or word[1].isdigit():
            positional.append(word)
            continue
        flag, equals, value = word.partition("=")
        key = flag[2:].replace("-", "_")
        key = f"{key}_" if iskeyword(key) else key  # --for is `for_` in Python
        _check_flag(name, flag, key, parameters)
        if key in flags:
            raise UserError(f"{name}: {flag} is given twice")
        if key in parameters and parameters[key].annotation is bool:
            if equals and value.lower() not in ("true", "false"):
                raise UserError(f"{name}: {flag} is a switch, it takes no value but true or false")
            flags[key] = not equals or value.lower() == "true"
            continue
        if not equals:
            if words and not words[0].startswith("--"):
                value = words.pop(0)
            elif key not in parameters and _recipe_fields()[key] is bool:
                value = "true"
            else:
                raise UserError(f"{name}: {flag} needs a value")
        flags[key] = value
    return positional, flags


def _recipe_fields() -> dict[str, Any]:
    from grow.methods import METHODS  # for start-up time, as elsewhere in grow.cli
    from grow.recipe_file import field_types

    return field_types(METHODS)


def _check_flag(name: str, flag: str, key: str, parameters: Mapping[str, Any]) -> None:
    named = [key for key, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if any(p.kind == p.VAR_KEYWORD for p in parameters.values()):
        named += _recipe_fields()
    if key not in named or not flag.startswith("--"):
        flags = ["--" + known.rstrip("_") for known in named]
        raise UserError(f"{name}: {unknown(flag, flags, 'flag')}")


def _needed(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Returns the arguments that must be given, by place or by name."""
    return [key for key, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD and p.default is p.empty]


def _complete(name: str, positional: list[str], flags: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    # Only required arguments may be given by place: `expand BASE OUT 3` would leave open what 3 is.
    places = [key for key in _needed(parameters) if key not in flags]
    needed = [key for key, p in parameters.items() if p.default is inspect.Parameter.empty and key not in flags]
    missing = [
        key
        for key in needed
        if key not in places[: len(positional)]
        and parameters[key].kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]
    if missing:
        what = missing[0].upper() if missing[0] in places else f"--{missing[0]}"
        raise UserError(f"{name}: {what} is missing (see grow {name} --help)")
    if len(positional) > len(places) and not any(p.kind == p.VAR_POSITIONAL for p in parameters.values()):
        raise UserError(f"{name}: {positional[len(places)]!r} is too much; options have names (see {name} --help)")


def with_flags(fields: Mapping[str, Field]) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Returns a decorator that gives a command flags for fields, and their help above that of --json. The command
    takes them in its last parameter, which stays in sight only if it is called `fields`, for those of a recipe."""

    def give(command: Callable[..., str]) -> Callable[..., str]:
        signature = inspect.signature(command)
        *own, last = signature.parameters.values()
        flags = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=spec.default, annotation=type(spec.default))
            for name, spec in fields.items()
        ]
        shown = signature.replace(parameters=[*own, *flags, *([last] if last.name == "fields" else [])])
        command.__signature__ = shown  # type: ignore[attr-defined]
        said = [
            textwrap.fill(f"{name}: {spec.help}", 118, initial_indent=" " * 8, subsequent_indent=" " * 12)
            for name, spec in fields.items()
        ]
        before, json, after = str(command.__doc__).rpartition("        json: ")
        assert before, f"{command.__name__} has no --json"
        before = before.removesuffix("        parts: What else grows.\n")
        command.__doc__ = before + "\n".join([*said, json]) + after
        return command

    return give


def number(flag: str, value: str, kind: type = int) -> Any:
    """Returns a flag's value as a number. Raises UserError if it is not one, or not finite."""
    try:
        found = kind(value)
    except ValueError:
        found = nan
    if not isfinite(found):
        raise UserError(f"{flag} {value}: a number is needed")
    return found


def run_script(function: Callable[..., Any], about: str) -> None:
    """Runs a script whose command line is that of one function, and whose help is `about`.

    Ends the process with exit code 2 and one line for a UserError.
    """
    name = function.__name__
    try:
        _, words, flags = checked([name, *(sys.argv[1:] or ["--help"])], {name: function})
        if "help" in flags:
            print(about)
        else:
            function(*words, **flags)
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
