"""Writing a policy as a plain Hugging Face folder."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from ebft.files import write_folder_atomically


def save_causal_lm(model, tokenizer, path: Path) -> None:
    """Save `model` (LoRA adapters merged into its weights, in float32) and `tokenizer` into the folder `path`.

    The folder is complete or absent, safetensors only, and loads in plain transformers.

    Raises:
        UsageError: no disk space.
    """
    if hasattr(model, "merge_and_unload"):
        model = copy.deepcopy(model).to(torch.float32).merge_and_unload()

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    write_folder_atomically(path, fill)
