"""`components`: what there is to choose from."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from ebft.errors import flag

EXAMPLES = ("components",)


def components() -> None:
    """List every sampler, feature map, objective, estimator and policy gradient, with options and defaults."""
    from ebft.components import GROUPS

    console = Console()
    for group, known in GROUPS.items():
        console.print(f"[bold]--{group}[/bold]")
        for name, entry in known.items():
            console.print(f"  [cyan]{name:<17}[/cyan] {escape(entry.summary)}", highlight=False, soft_wrap=True)
            flags = "  ".join(
                f"{flag(option)} {'(none)' if default is None else default}"
                for option, default in entry.options.items()
            )
            if flags:
                console.print(f"  {'':<17} [dim]{escape(flags)}[/dim]", highlight=False, soft_wrap=True)
