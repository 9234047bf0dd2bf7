"""Getting a causal language model ready: its source, device, precision and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from safetensors import SafetensorError

from ebft.assets import resolve
from ebft.distributed import local_number, size
from ebft.errors import UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def choose_device(device: str) -> torch.device:
    """`auto` is a GPU when there is one; of several processes on a machine each has its own.

    Raises:
        UsageError: CUDA asked for and absent, fewer GPUs than processes, or a name that torch does not know.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"device {device!r}: torch finds no CUDA device here. Use --device cpu or auto")
    if chosen.type == "cuda" and size() > 1:
        if chosen.index is not None:
            raise UsageError(f"device {device!r}: {size()} processes cannot share one; use --device cuda")
        chosen = torch.device("cuda", local_number())
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {device!r}: there are only {torch.cuda.device_count()} CUDA devices, and this asks for number"
            f" {chosen.index}"
        )
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    return chosen


def choose_precision(dtype: str, device: torch.device) -> tuple[torch.dtype, torch.dtype | None]:
    """(dtype of the trained weights, autocast dtype or None).

    `auto`: float32 weights, computed in bfloat16 where the hardware has units for it.
    """
    if dtype == "auto":
        return torch.float32, torch.bfloat16 if _has_bfloat16_units(device) else None
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r}: expected auto or one of {', '.join(DTYPES)}")
    return DTYPES[dtype], None


def _has_bfloat16_units(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu.get_capabilities().get("avx512_bf16") or torch.cpu.get_capabilities().get("amx_bf16"))


_EXPECTED = (
    "Expected an embedded name (smollm2-135m), a folder with config.json, safetensors weights and a tokenizer, or a"
    " hub id"
)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of an embedded name, a folder or a hub id.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer

    with _clear_errors(name, "as a tokenizer"):
        return AutoTokenizer.from_pretrained(resolve(name))


def model_source(name: str) -> str:
    """Where transformers finds a model by name: the folder of an embedded one, a folder, or a hub id as it is.

    Raises:
        UsageError: a folder without a model.
    """
    source = resolve(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise UsageError(f"policy {name!r} is a folder that holds no model (no config.json). {_EXPECTED}")
    return source


def load_causal_lm(name: str, *, weights: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Model and tokenizer of an embedded name, a folder or a hub id.

    Raises:
        UsageError: `name` is neither a model folder nor a hub id that can be had, or holds no causal LM.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = model_source(name)
    with _clear_errors(name, "as a causal language model"):
        tokenizer = AutoTokenizer.from_pretrained(source)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=weights)
    return model.to(device), tokenizer


@contextmanager
def _clear_errors(name: str, what: str) -> Iterator[None]:
    """Turn what transformers raises when it cannot load `name` into one clear UsageError."""
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(f"policy {name!r} could not be loaded {what}: {reason}. {_EXPECTED}") from error


def add_adapters(model, *, rank: int, seed: int, autocast: bool = False):
    """Wrap a model with LoRA adapters of `rank` on all linear layers but the head; only they are trained.

    The frozen weights are kept in the dtype they have; the adapters are float32. `autocast`: forward passes will run
    under autocast.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise UsageError(f"lora rank {rank}: expected a whole number >= 1, or 0 for full fine-tuning")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), catch_warnings():
        simplefilter("ignore", FutureWarning)  # peft asks transformers in a way that the latter is about to rename
        torch.manual_seed(seed)
        adapted = get_peft_model(model, config, autocast_adapter_dtype=True)
    for module in adapted.modules():
        # autocast chooses the compute dtype; peft would cast every input to float32 only for autocast to cast it back
        if hasattr(module, "lora_A"):
            layer: Any = module
            layer.cast_input_dtype_enabled = not autocast
    return adapted
