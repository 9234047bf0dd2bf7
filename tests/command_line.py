"""The command line, called as the `ebft` script calls it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ebft import cli
from ebft.errors import flag


def call(monkeypatch, capsys, command: Sequence[Any], options: Mapping[str, Any]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr; an option that is None is left out, one that is True stands alone."""
    argv = ["ebft", *map(str, command)]
    for name, value in options.items():
        argv += [] if value is None else [flag(name)] + ([] if value is True else [str(value)])
    monkeypatch.setattr(sys, "argv", argv)
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def replaced(argv: Sequence[str], options: Mapping[str, Any]) -> list[str]:
    """A command line with options, of one value each, in the place of those of the same name."""
    kept = list(argv)
    for name, value in options.items():
        if flag(name) in kept:
            at = kept.index(flag(name))
            del kept[at : at + 2]
        kept += [flag(name), str(value)]
    return kept


def assert_refused(result, *parts):
    """Exit code 2 and one message, with everything in `parts`, on stderr; no traceback."""
    code, _, err = result
    assert code == 2, err
    messages = [line for line in err.splitlines() if "rror" in line]
    assert len(messages) == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert str(part) in err, f"{part!r} not in {err!r}"
