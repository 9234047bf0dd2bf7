"""Options of a command from a file: YAML, JSON, the `config.json` of an earlier run, or a preset of the package."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from ebft.components.component import nearest
from ebft.errors import UsageError

_PRESETS = files("ebft") / "presets"


def yaml_names(folder: Traversable) -> list[str]:
    """The YAML files of a folder of the package, without their ending."""
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def preset_names() -> list[str]:
    return yaml_names(_PRESETS)


def read_preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Raises:
        UsageError: an unknown name.
    """
    known = preset_names()
    if name not in known:
        raise UsageError(f"unknown preset {name!r}{nearest(name, known)}: expected one of {', '.join(known)}")
    return _options(yaml.safe_load((_PRESETS / f"{name}.yaml").read_text(encoding="utf-8")), f"preset {name}")


def read_option_file(path: Path) -> dict[str, Any]:
    """The options in a file; of a run's `config.json` those that the run was given.

    Raises:
        UsageError: no such file, or one that does not hold a mapping of options.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"--config {path}: cannot be read ({error}); expected a YAML or JSON file of options"
        ) from error
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise UsageError(f"--config {path} is neither YAML nor JSON: {problem}") from error
    if isinstance(content, dict) and isinstance(content.get("options"), dict):
        content = content["options"]
    return _options(content, f"--config {path}")


def _options(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UsageError(f"{where} holds {type(content).__name__}; expected options with their values, as `lr: 0.001`")
    found: dict[str, Any] = {}
    for key, value in content.items():
        name = key.removeprefix("--").replace("-", "_")
        if name in found:
            raise UsageError(f"{where}: {name} is there twice")
        found[name] = value
    return found


def check_names(options: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Check that all options are known.

    Raises:
        UsageError: names the first that is not, and the nearest that is.
    """
    for name in options:
        if name not in known:
            raise UsageError(f"{where}: unknown key {name!r}{nearest(name, known)}; `run --help` lists the options")


def convert(value: Any, hint: Any, where: str) -> Any:
    """A value of a file as the option's type: YAML reads 1e-3 as text, and 0.2 as a number where text is wanted.

    Args:
        hint: type of the option, as bool, int, float, str, Path or one of these and None.

    Raises:
        UsageError: it is of another type.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kind = next(kind for kind in kinds if kind is not type(None))
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return [convert(entry, inner, where) for entry in (value if isinstance(value, list) else [value])]
    wrong = UsageError(f"{where}: {value!r} is no {'text' if kind is str else kind.__name__}")
    if isinstance(value, dict) or isinstance(value, bool) != (kind is bool):
        raise wrong
    if isinstance(value, list):
        value = ",".join(map(str, value))
    try:
        return kind(str(value)) if kind is not bool else value
    except ValueError as error:
        raise wrong from error
