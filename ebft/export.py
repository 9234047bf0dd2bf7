"""Writing a policy as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ebft.files import write_folder_atomically
from ebft.sharding import with_parameters


def save_causal_lm(model, tokenizer, path: Path) -> None:
    """Save `model` (LoRA adapters merged into its weights, in float32) and `tokenizer` into the folder `path`.

    The folder is complete or absent, safetensors only, and loads in plain transformers.

    Raises:
        UsageError: no disk space.
    """
    if hasattr(model, "merge_and_unload"):
        # on a CPU: a float32 copy may be larger than everything that training keeps on the device
        weights = {
            name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in model.named_parameters()
        }
        whole: Any = with_parameters(model, weights)
        model = whole.to("cpu", torch.float32).merge_and_unload()

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder_atomically(path, fill)
