"""What the commands share: the panels of their help, and options with a panel."""

from __future__ import annotations

import copy
import inspect
import typing
from collections.abc import Callable, Collection, Mapping
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

METHOD, MODEL, DATA, SAMPLING = "Method", "Model", "Text", "Rollouts"
MATCHING, LOSS, TRAINING, OUTPUT = "What is matched", "Loss", "Training", "Output"


def examples(*lines: str) -> str:
    """Command lines, without the program's name, as what the help of a command ends with."""
    return "\n\n".join(["**Examples**", "", *(f"* `ebft {line}`" for line in lines)])


def option(panel: str, help: str, *names: str, **extra: Any):
    """A typer option that stands under `panel` in the help."""
    return typer.Option(*names, help=help, rich_help_panel=panel, **extra)


# What a file of options may not set: where options come from and where results go.
_OF_THE_CALL = ("config", "preset", "out", "resume", "force")


def from_config(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of --config: its options count as defaults of the command, over those of a preset."""
    from ebft.assemble.option_files import read_option_file

    if path is not None:
        options = _converted(context, read_option_file(path), f"--config {path}")
        context.default_map = {**(context.default_map or {}), **options}
    return path


def from_preset(context: typer.Context, name: str | None) -> str | None:
    """Callback of --preset: its options count as defaults of the command."""
    from ebft.assemble.option_files import read_preset

    if name is not None:
        options = _converted(context, read_preset(name), f"preset {name}")
        context.default_map = {**options, **(context.default_map or {})}
    return name


def _converted(context: typer.Context, options: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options as the command line would have them; those that are null are as if they were not there.

    Raises:
        UsageError: an unknown option, or a value of another type.
    """
    from ebft.assemble.option_files import check_names, convert
    from ebft.commands.run import run

    hints = typing.get_type_hints(run)
    known = {parameter.name: hints[parameter.name] for parameter in context.command.params if parameter.name in hints}
    known = {name: hint for name, hint in known.items() if name not in _OF_THE_CALL}
    check_names(options, known, where)
    return {
        name: convert(value, known[name], f"{where}: {name}") for name, value in options.items() if value is not None
    }


def plain(value: Any) -> Any:
    """The values of an option that may be given again as a list, None where there are none; others as they are."""
    return (list(value) or None) if isinstance(value, tuple) else value


def given_options(context: typer.Context, *, besides: Collection[str]) -> tuple[dict[str, Any], set[str]]:
    """The options of a command but those named in `besides`, by parameter name, and which of them the user gave.

    Those from files of options count as given. --steps on the command line is instead of --epochs in a file.
    """
    options = {name: plain(value) for name, value in context.params.items() if name not in besides}
    sources = {name: context.get_parameter_source(name).name for name in options}  # type: ignore[union-attr]
    for name, other in (("epochs", "steps"), ("steps", "epochs")):
        if sources.get(name) == "DEFAULT_MAP" and sources.get(other) == "COMMANDLINE":
            options[name] = None
    return options, {name for name in options if sources[name] in ("COMMANDLINE", "DEFAULT_MAP")}


def with_options_of(
    *others: Callable[..., None],
    only: Collection[str] | None = None,
    without: Collection[str] = (),
    panel: str | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of others too, which it finds in `context.params`; it takes `context` first.

    Its own options stand where it has one of the same name.

    Args:
        others: commands, or functions of `declared`.
        only, without: which of their options; all when left out.
        panel: of the help, under which they stand; None: their own.
    """
    more = {name: p for other in others for name, p in inspect.signature(other, eval_str=True).parameters.items()}
    wanted = [name for name in more if name not in without and (only is None or name in only)]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(function, eval_str=True).parameters
        shared = [more[name] if panel is None else _under(panel, more[name]) for name in wanted if name not in own]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in (*own.values(), *shared)]

        @wraps(function)
        def command(**values: Any) -> None:
            function(**{name: values[name] for name in own})

        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def _under(panel: str, parameter: inspect.Parameter) -> inspect.Parameter:
    """A parameter with its option under another panel."""
    kind, info = typing.get_args(parameter.annotation)
    moved = copy.copy(info)
    moved.rich_help_panel = panel
    return parameter.replace(annotation=Annotated[kind, moved])
