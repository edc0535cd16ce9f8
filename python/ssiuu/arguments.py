"""Command lines and YAML files made from dataclasses and function signatures.

pydantic-settings makes the parser, and pydantic checks every value, from the command line and from a file, by the type
that the dataclass declares. Why not another library: jsonargparse spells flags with underscores and wants a value after
`--bf16`; tyro reports errors in boxes and exits, and offers no public way to make them one line. pydantic's errors are
data (name, value, reason). The parsed words are taken as argparse has them: the library's own reading of lists splits
folder names at commas and brackets.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic_core import PydanticUndefined
from pydantic_settings import CliPositionalArg, CliSettingsSource

REQUIRED = dataclasses.MISSING
NONE = "None"  # on a command line, for an option that may be None


class Argument(NamedTuple):
    """One option or positional argument.

    Attributes:
        name: as in Python and YAML; the flag has dashes.
        type: what its value is checked by.
        default: REQUIRED where there is none.
        help: from the docstring.
        positional: whether it is given without a flag.
    """

    name: str
    type: Any
    default: Any
    help: str
    positional: bool = False

    @property
    def flag(self) -> str:
        """As written on the command line."""
        return self.name.upper() if self.positional else f"--{self.name.replace('_', '-')}"

    def check(self, value: Any, spelled: str, *, strict: bool = False) -> Any:
        """The value in this argument's type.

        Args:
            value: a text of the command line, or (strict) a value from a file, which is not converted.
            spelled: the argument's name in messages.

        Raises:
            ValueError: another type, naming the argument, the value and what was expected.
        """
        if value == NONE and not strict and type(None) in get_args(self.type):
            return None
        try:
            return TypeAdapter(self.type).validate_python(value, strict=strict)
        except ValidationError as error:
            why = error.errors()[0]["msg"].replace("Input should be", "expected")
            raise ValueError(f"{spelled}={value!r}; {why}") from None


def fields_of(kind: type) -> list[Argument]:
    """The fields of a dataclass, with the help of its "Attributes:" section."""
    types, helps = get_type_hints(kind, include_extras=True), described(kind)
    return [
        Argument(
            field.name,
            types[field.name],
            field.default if field.default_factory is REQUIRED else field.default_factory(),
            helps.get(field.name, ""),
        )
        for field in dataclasses.fields(kind)
    ]


def parameters_of(function: Callable) -> list[Argument]:
    """The parameters of a function, with the help of its "Args:" section; positional-only ones are positional."""
    types, helps = get_type_hints(function, include_extras=True), described(function)
    return [
        Argument(
            parameter.name,
            types[parameter.name],
            REQUIRED if parameter.default is parameter.empty else parameter.default,
            helps.get(parameter.name, ""),
            parameter.kind is parameter.POSITIONAL_ONLY,
        )
        for parameter in inspect.signature(function).parameters.values()
    ]


def described(source: type | Callable) -> dict[str, str]:
    """Name -> text of the "Attributes:" or "Args:" section of a docstring, and for a class of its bases' too."""
    helps = {}
    for kind in reversed(getattr(source, "__mro__", (source,))):
        text = inspect.cleandoc(kind.__doc__ or "")
        for section in re.findall(r"^(?:Attributes|Args):\n((?: .*\n?|\n)+)", text, re.M):
            for names, meaning in re.findall(r"^(\w[\w, ]*): (.*(?:\n .*)*)", textwrap.dedent(section), re.M):
                helps |= dict.fromkeys(names.split(", "), " ".join(meaning.split()))
    return helps


def text_of(function: Callable, width: int) -> str:
    """A function's docstring without its "Args:", in lines of this width; indented lines stay as they are."""
    paragraphs = inspect.cleandoc(function.__doc__ or "").partition("\n\nArgs:")[0].split("\n\n")
    return "\n\n".join(text if "\n " in text else textwrap.fill(text, width) for text in paragraphs)


def peek(prog: str, words: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Name -> text of some options of a command line, whatever else it holds."""
    parser = _OneLineParser(prog=prog, add_help=False, allow_abbrev=False)
    for name in names:
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    return vars(parser.parse_known_args(list(words))[0])


class Parser:
    """Reads a command line and a file into names and values.

    Args:
        prog: the command, as in "ssiuu unlearn".
        text: what the help says of it.
        own: arguments that the command line alone may give.
        options: title in the help -> options, which a file may give too.
        what: has these options, in messages.
        elsewhere: name -> who has it, of options that are not among these.
    """

    def __init__(
        self,
        prog: str,
        text: str,
        own: Sequence[Argument],
        options: Mapping[str, Sequence[Argument]],
        *,
        what: str | None = None,
        elsewhere: Mapping[str, str] | None = None,
    ):
        self.prog, self.what, self.elsewhere = prog, what or f"`{prog}`", elsewhere or {}
        self.options = {argument.name: argument for group in options.values() for argument in group}
        self.arguments = {argument.name: argument for argument in own} | self.options
        positional = [argument for argument in own if argument.positional]
        self._parser = _OneLineParser(
            prog=prog,
            usage=" ".join([prog, *(argument.flag for argument in positional), "[options]"]),
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
        )
        if positional:
            _add(self._parser.add_argument_group("arguments"), positional)
        group = self._parser.add_argument_group("options")
        group.add_argument("-h", "--help", action="help", help="show this help and exit")
        _add(group, [argument for argument in own if not argument.positional])
        for title, arguments in options.items():
            _add(self._parser.add_argument_group(title), arguments)

    def help(self) -> str:
        """What --help prints."""
        return self._parser.format_help()

    def parse(self, words: Sequence[str]) -> dict[str, Any]:
        """Name -> value of the arguments that were given.

        Raises:
            ValueError: a word that is not expected, a value that is missing, or one of another type.
            SystemExit: after --help.
        """
        given, unknown = self._parser.parse_known_intermixed_args(list(words))
        if unknown:
            flag = unknown[0].partition("=")[0]
            raise ValueError(self._refusal(flag, flag.lstrip("-").replace("-", "_"), self.arguments, "flag"))
        texts = {name: text for name, text in vars(given).items() if text is not PydanticUndefined}
        return {name: self.arguments[name].check(text, self.arguments[name].flag) for name, text in texts.items()}

    def read(self, values: Mapping[str, Any], file: Path) -> dict[str, Any]:
        """Name -> value of a file's contents, of options alone.

        Raises:
            ValueError: a name that no option has, or a value of another type.
        """
        for name in values:
            if name not in self.options:
                raise ValueError(f"{file}: {self._refusal(name, str(name), self.options, 'name')}")
        return {name: self.options[name].check(value, f"{file}: {name}", strict=True) for name, value in values.items()}

    def _refusal(self, spelled: str, name: str, known: Mapping[str, Argument], spelling: str) -> str:
        near = difflib.get_close_matches(name, known, 1, cutoff=0.7)
        if name in self.elsewhere:
            hint = f"it is one of {self.elsewhere[name]}"
        elif near:
            hint = f"did you mean {getattr(known[near[0]], spelling)}?"
        else:
            hint = f"see `{self.prog} --help`"
        return f"{spelled} is not an option of {self.what}; {hint}"

    def require(self, values: Mapping[str, Any]) -> None:
        """Raise a ValueError for an argument without a default that is not among these values."""
        for argument in self.arguments.values():
            if argument.default is REQUIRED and argument.name not in values:
                raise ValueError(f"{argument.flag} is missing; see `{self.prog} --help`")


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise ValueError(f"{message}; see `{self.prog} --help`")


def _add(group: argparse._ArgumentGroup, arguments: Iterable[Argument]) -> None:
    fields = {
        argument.name: (
            CliPositionalArg[argument.type] if argument.positional else argument.type,
            Field(
                ... if argument.default is REQUIRED else argument.default,
                description=argument.help.replace("%", "%%"),
            ),
        )
        for argument in arguments
    }
    model = create_model("Arguments", __config__=ConfigDict(protected_namespaces=()), **fields)
    CliSettingsSource(
        model, root_parser=group, cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True,
        cli_avoid_json=True, cli_parse_none_str=NONE,
    )  # fmt: skip


class _Loader(yaml.SafeLoader):
    """YAML 1.1 in which 1e-5 is a number, as in YAML 1.2 and JSON, and a name may be given once."""

    def construct_mapping(self, node, deep=False):
        names = [self.construct_object(name, deep=True) for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name} is given {names.count(name)} times; expected once")
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(file: Path) -> dict[str, Any]:
    """Name -> value of a YAML file, or of a JSON file, which is YAML too.

    Raises:
        OSError: it cannot be read.
        ValueError: no YAML, no mapping, or a name that is given twice.
    """
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds {type(values).__name__}; expected option names and values")
    return values
