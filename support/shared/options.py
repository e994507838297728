"""Options: a dataclass of settings is the only place that names them."""

import argparse
import dataclasses
from collections.abc import Callable, Iterable


def opt(group: str, default: object, help: str, *choices: str) -> object:
    """A field of a dataclass of settings, with what --help says of it."""
    about = {"group": group, "help": help, "choices": choices or None}
    return dataclasses.field(default=default, metadata=about)


def make_parser(settings: type, prog: str, doc: str) -> argparse.ArgumentParser:
    """A parser with an option for each field; bools are --x and --no-x, tuples take several."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [options]",
        allow_abbrev=False,
        description=doc.split("\n\n")[0].strip(),
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    groups = {}
    for field in dataclasses.fields(settings):
        name = field.metadata["group"]
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        kind = {"type": field.type, "metavar": field.type.__name__}
        if field.type is bool:
            kind = {"action": argparse.BooleanOptionalAction}
        elif field.type is tuple:
            kind = {"nargs": "+", "metavar": "DIR"}
        elif field.metadata["choices"]:
            kind = {"choices": field.metadata["choices"]}
        about = field.metadata["help"]
        groups[name].add_argument(f"--{field.name}", default=field.default, help=about, **kind)
    return parser


Rule = tuple[object, str]  # is it broken?, what to say then


def check_rules(rules: Iterable[Rule], complain: Callable[[str], object]) -> None:
    """`complain` with the sentence of the first rule that is broken."""
    for broken, sentence in rules:
        if broken:
            complain(sentence)
            return
