"""`data`: the data card of a data set."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.options import MODEL, option

EXAMPLES = (
    "data",
    "data qa-code",
)


def data(
    name: Annotated[str | None, typer.Argument(help="A data set; without it, all of them are listed.")] = None,
    policy: Annotated[
        str, option(MODEL, "Model whose tokens are counted: smollm2-135m, a folder or a hub id.")
    ] = "smollm2-135m",
) -> None:
    """Show what a data set holds: counts, lengths in tokens, licence, source and a sample.

    The data sets come from hash-pinned packages, the running Python and, for translation, Debian's package tools. They
    are built on first use and kept in the cache; `qa-code` runs its reference programs in the sandbox, which takes a
    minute or two.
    """
    from ebft.assemble import list_data_sets, print_card

    if name is None:
        list_data_sets(Console())
    else:
        print_card(name, policy=policy, console=Console())
