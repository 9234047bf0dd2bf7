"""What protects this machine from generated programs, said where some are about to run."""

from __future__ import annotations

from rich.console import Console

from ebft import sandbox


def say_protections(console: Console) -> None:
    """Print which protections of the sandbox are not to be had on this machine; nothing where all are."""
    missing = sandbox.weaknesses()
    if missing:
        console.print(
            f"generated programs run in a sandbox that is not whole on this machine: {'; '.join(missing)}",
            highlight=False,
            soft_wrap=True,
        )
