"""A command that refuses an option given twice, where the last value would silently win."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand

from ebft.errors import UsageError


class OncePerOption(TyperCommand):
    """A command whose options are given once each, but for those that take several values.

    Raises:
        UsageError: one is given again; it repeats the values.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not ctx.resilient_parsing:  # completion in a shell
            _, _, order = self.make_parser(ctx).parse_args(args=list(args))
            for parameter, times in Counter(order).items():
                if times > 1 and parameter.param_type_name == "option" and not parameter.multiple:
                    given = " ".join(_given([*parameter.opts, *parameter.secondary_opts], args))
                    raise UsageError(
                        f"{given}: given {times} times, expected once; an option that takes several values wants"
                        " commas between them"
                    )
        return super().parse_args(ctx, args)


def _given(names: Sequence[str], args: Sequence[str]) -> list[str]:
    """The arguments that give an option, with its values."""
    found: list[str] = []
    for place, word in enumerate(args):
        if word in names:
            value = args[place + 1 : place + 2]
            found += [word, *(value if value and not value[0].startswith("--") else [])]
        elif word.partition("=")[0] in names:
            found.append(word)
    return found
