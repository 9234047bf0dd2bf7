"""`data`: the data card of a data set."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from ebft.commands.declared import of_text
from ebft.commands.options import MODEL, given_options, option, with_options_of
from ebft.errors import UsageError, flag

EXAMPLES = (
    "data",
    "data qa-code",
    "data someone/questions --prompt-field question --tests-field unit_tests",
)


@with_options_of(of_text, only=("text_field", "prompt_field", "answer_field", "tests_field"))
def data(
    context: typer.Context,
    name: Annotated[
        str | None,
        typer.Argument(
            help="A data set by name, or whatever --data of `run` reads; without it, those with a name are listed."
        ),
    ] = None,
    policy: Annotated[
        str, option(MODEL, "Model whose tokens are counted: smollm2-135m, a folder or a hub id.")
    ] = "smollm2-135m",
) -> None:
    """Show what a data set holds: counts, lengths in tokens, licence, source and a sample.

    A file, a folder or a hub data set is read as `run` reads it, by the same fields. The data sets with a name come
    from hash-pinned packages, the running Python and, for translation, Debian's package tools, those of the paper from
    the hub. They are built on first use and kept in the cache; `qa-code` runs its reference programs in the sandbox,
    which takes a minute or two.
    """
    from ebft.assemble import list_data_sets, print_card

    fields, given = given_options(context, besides=("name", "policy"))
    if name is not None:
        print_card(name, policy=policy, console=Console(), fields=fields)
        return
    for field in given:
        raise UsageError(f"{flag(field)} {fields[field]} is of one data set: name it")
    list_data_sets(Console())
