"""Reading a command line: ``[RECIPE] --field value`` onto a typed value, by tyro."""

import contextlib
import io
import itertools
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, TypeVar

import tyro

from amsdn.errors import InputError
from amsdn.recipes import DEFAULT, RECIPES, Recipe, get_recipe

T = TypeVar("T")
_rules = tyro.constructors.ConstructorRegistry()


def parse_number(text: str) -> float:
    """``0.03``, ``1e-3`` or a fraction such as ``8/255``; raises ValueError for anything else."""
    if "/" not in text:
        return float(text)
    try:
        return float(Fraction(text))
    except ZeroDivisionError as e:
        raise ValueError(f"division by zero in {text!r}") from e


@_rules.primitive_rule
def _number_rule(info: Any) -> Any:
    """Let every float field take a fraction."""
    if info.type is not float:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="FLOAT",
        instance_from_str=lambda texts: parse_number(texts[0]),
        is_instance=lambda value: isinstance(value, float | int),
        str_from_instance=lambda value: [f"{value:g}"],
    )


def parse(default: T, args: Sequence[str], command: str, description: str) -> T:
    """``args`` laid over the fields of ``default``, a dataclass. Raises InputError where they do not fit."""
    complaint = io.StringIO()
    try:
        with _rules, contextlib.redirect_stderr(complaint):
            return tyro.cli(
                type(default),
                default=default,
                args=list(args),
                prog=f"amsdn {command}",
                description=description,
                config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),  # what a recipe chose among kinds stays chosen
            )
    except SystemExit as e:
        if e.code:
            raise InputError(f"{_first_paragraph(complaint.getvalue())}; see amsdn {command} --help") from e
        raise


def _first_paragraph(box: str) -> str:
    """What tyro says first inside the box it draws, as one line."""
    inside = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    if inside:
        said = itertools.takewhile(lambda line: not line.startswith("─"), inside)
        return " ".join(line for line in said if line)
    plain = re.sub(r"\x1b\[[0-9;]*m|(?<!\S)[─-]{5,}(?!\S)", " ", box)  # where it is no terminal there is no box, but rules between parts
    return " ".join(plain.split("For full helptext")[0].split())


def split_recipe(args: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe named first (the default one where the first word is an option), and the other words."""
    if args and not args[0].startswith("-"):
        return get_recipe(args[0]), list(args[1:])
    return get_recipe(DEFAULT), list(args)


def positive(value: int | None, flag: str) -> None:
    """Raise InputError unless ``value`` is None or at least 1."""
    if value is not None and value < 1:
        raise InputError(f"{flag} must be at least 1, got {value}")


def recipe_help() -> str:
    """The recipes, a line each, for help texts."""
    recipes = {name: make() for name, make in RECIPES.items()}
    return "Recipes:\n" + "\n".join(f"  {name}: {r.about}; {r.cost}" for name, r in recipes.items())
