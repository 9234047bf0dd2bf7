"""CausalPolicy: a transformers causal language model that samples, scores and embeds over combs.

The model is used as it is: the backbone up to its last hidden state with `ebft.attention` as its attention function,
then the head in chunks, so that no [tokens, vocabulary] tensor exists beyond a chunk. Dropout is never applied: the
log-probabilities of the scorer must be those of the sampler.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ebft import attention, comb_sampling, comb_scoring
from ebft.architectures import comb_differs, decoder_layers, position_limits, refuse_unknown_head, why_not_a_comb
from ebft.distributed import is_first
from ebft.errors import UsageError
from ebft.export import save_causal_lm
from ebft.layout import NestedPrefixLayout
from ebft.loading import add_adapters, choose_device, choose_precision, load_causal_lm
from ebft.offload import Offload, frozen_copy, move_to_cpu
from ebft.rows import row_states
from ebft.static_decode import DECODES, StaticDecoder
from ebft.taps import layer_outputs, recomputed
from ebft.tuning import PerDevice

if TYPE_CHECKING:
    from ebft.sharding import ShardedModel

# Kernels of a policy: those of a comb, and one plain forward pass per rollout.
KERNELS = (*attention.KERNELS, "rows")

# Options of configurations by which some families change their logits, see `CausalPolicy.logits`.
_LOGIT_SCALINGS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "logits_soft_cap")

# Rows of the head that are computed at once, unless a policy is told otherwise.
HEAD_ROWS = PerDevice(cpu=128, cuda=512)


def scales_logits(config: Any) -> bool:
    """Whether a model of this configuration does something to the logits of its head."""
    return any(getattr(config.get_text_config(), name, None) is not None for name in _LOGIT_SCALINGS)


class CausalPolicy:
    """Any transformers causal LM, driven over nested prefixes.

    A model whose layers all attend shares each prefix among all its rollouts. Of another one (linear attention, state
    space, attention that is not pluggable) `not_shared` says why it cannot: `sample` refuses it and names the samplers
    that can, `score` and `hidden_states` run one plain forward pass per rollout.

    Args:
        model: a transformers causal LM, or one wrapped by peft. From here on its attention belongs to this policy;
            `plain()` gives it back for a while.
        tokenizer: optional, for those who need text.
        autocast: compute dtype of forward passes (weights stay as they are), None for the weights' own.
        kernel: how `score` and `hidden_states` run: ``dense``, ``chunked``, ``flex`` (see `ebft.attention.Score`), or
            ``rows``: one plain forward pass per rollout. None: the fastest known for the model and its device.
        checkpointing: keep only what enters each decoder layer for the backward pass of `score`, and compute the rest
            again: about a third more time, a fraction of the memory.
        head_rows: rows of logits of the whole vocabulary computed at once; None: as many as are fast on the device.
        decode: how `sample` runs its steps: ``eager``, without what has ended; ``compile`` or ``graph``, with static
            shapes through torch.compile or as one CUDA graph (`ebft.static_decode`).
        offload_frozen: keep `reference()`, where it is a copy, and other frozen networks of this policy in CPU memory
            while they are not used.

    Raises:
        UsageError: an encoder-decoder; a model that does something unknown to its logits; a kernel or a way to decode
            that is unknown or that the model cannot use.
    """

    def __init__(
        self,
        model: Any,
        tokenizer=None,
        *,
        autocast: torch.dtype | None = None,
        kernel: str | None = None,
        checkpointing: bool = False,
        head_rows: int | None = None,
        decode: str = "eager",
        offload_frozen: bool = False,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.autocast, self.checkpointing = autocast, checkpointing
        self.causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(self.causal_lm.config, "is_encoder_decoder", False):
            raise UsageError(f"{type(self.causal_lm).__name__} is an encoder-decoder: expected a causal language model")
        self.offload_frozen = offload_frozen
        self.offload: Offload | None = None  # of the weights of this policy itself, if it is frozen
        self.head_rows = HEAD_ROWS.on(self.device) if head_rows is None else head_rows
        self.adapters_off = False
        self.sharded: ShardedModel | None = None  # see `ebft.sharding.shard`
        self._plain_attention = self.causal_lm.config._attn_implementation
        model.eval()
        self.not_shared = why_not_a_comb(self.causal_lm)
        if self.not_shared is None:
            self.causal_lm.set_attn_implementation(attention.NAME)
            self.not_shared = comb_differs(self)
        if self.not_shared is not None:
            self.causal_lm.set_attn_implementation(self._plain_attention)
        refuse_unknown_head(self)
        self.kernel = self._choose_kernel(kernel)
        self.static = self._choose_decoder(decode)

    @classmethod
    def from_pretrained(
        cls,
        name: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        lora: int | None = None,
        seed: int = 0,
        frozen: bool = False,
        **options,
    ) -> CausalPolicy:
        """Load a policy.

        Args:
            name: an embedded name (`smollm2-135m`), a folder or a hub id.
            device: `auto`, `cpu`, `cuda`, `cuda:N`.
            dtype: `auto` (float32 weights, bfloat16 compute where the hardware has it; frozen weights are kept in
                bfloat16 then) or a torch dtype's name for weights and compute.
            lora: rank of LoRA adapters, None for full fine-tuning; `seed` draws their start.
            frozen: the policy is not to be trained, and none of its weights takes gradients.
            options: `kernel`, `checkpointing`, `head_rows`, `decode`, `offload_frozen`.

        Raises:
            UsageError: anything that cannot be loaded, chosen or served.
        """
        chosen = choose_device(device)
        weights, autocast = choose_precision(dtype, chosen)
        if (lora or frozen) and autocast:
            weights = autocast
        model, tokenizer = load_causal_lm(name, weights=weights, device=chosen)
        if frozen:
            model.requires_grad_(False)
        if lora:
            model = add_adapters(model, rank=lora, seed=seed, autocast=autocast is not None)
        return cls(model, tokenizer, autocast=autocast, **options)

    # ---- what it is made of

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device if self.offload is None else self.offload.device

    @property
    def num_layers(self) -> int:
        return len(self._layers())

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: all of them, or the adapters' only."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def reference(self) -> CausalPolicy:
        """The policy as it is now, frozen: a copy; with fresh LoRA adapters the same weights with the adapters off."""
        frozen = copy.copy(self)
        frozen.static = None  # it has the policy's weights; a reference scores
        if hasattr(self.model, "disable_adapter"):
            frozen.adapters_off = True
            return frozen
        if self.sharded is not None:
            frozen.model = frozen.causal_lm = self.sharded.skeleton()
            frozen.sharded = type(self.sharded)(frozen.model, frozen._layers(), like=self.sharded)
        elif self.offload_frozen:
            frozen.model = frozen.causal_lm = frozen_copy(self.causal_lm)
            frozen.offload = Offload(frozen.model, self.device)
        else:
            frozen.model = frozen.causal_lm = copy.deepcopy(self.causal_lm).requires_grad_(False)
        return frozen

    def move_to_cpu(self) -> None:
        """Keep the weights, which are frozen, in CPU memory from now on, on the device inside `resident()` alone."""
        device = self.device
        move_to_cpu(self.model)
        self.offload = Offload(self.model, device)

    def save_pretrained(self, path) -> None:
        """Write the policy as a plain Hugging Face folder, adapters merged; see `ebft.export.save_causal_lm`.

        Of a sharded policy all processes call it, and the first one writes.
        """
        model = self.model if self.sharded is None else self.sharded.on_first(first=is_first())
        if model is not None:
            save_causal_lm(model, self.tokenizer, Path(path))

    def _choose_kernel(self, kernel: str | None) -> str:
        if kernel is None:
            return "rows" if self.not_shared else attention.default_kernel(self.device)
        if kernel not in KERNELS:
            raise UsageError(f"kernel {kernel!r}: expected one of {', '.join(KERNELS)}")
        if self.not_shared and kernel != "rows":
            raise UsageError(f"kernel {kernel!r}: {self._cannot_share()}; use 'rows', or leave the kernel out")
        return kernel

    def _choose_decoder(self, decode: str) -> StaticDecoder | None:
        if decode not in DECODES:
            raise UsageError(f"decode {decode!r}: expected one of {', '.join(DECODES)}")
        if decode == "eager":
            return None
        if self.not_shared:
            raise UsageError(f"decode {decode!r}: {self._cannot_share()}; use 'eager'")
        if decode == "graph" and self.device.type != "cuda":
            raise UsageError(
                f"decode 'graph': the device is {self.device.type}, and CUDA graphs are of GPUs; use 'eager' or"
                " 'compile'"
            )
        return StaticDecoder(self, decode)

    def require_shared(self) -> None:
        """Raise UsageError if the model cannot share a prefix between rollouts; it names the samplers that can."""
        if self.not_shared:
            raise UsageError(
                f"{self._cannot_share()}. Use the 'snapshot' sampler for it ('independent' is slower), or another model"
            )

    def _cannot_share(self) -> str:
        return f"{type(self.causal_lm).__name__} cannot share a prefix between rollouts: {self.not_shared}"

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """The model with its own attention, for plain forward passes and `generate`."""
        driven = self.causal_lm.config._attn_implementation
        self.causal_lm.set_attn_implementation(self._plain_attention)
        try:
            with self.computing():
                yield self.model
        finally:
            self.causal_lm.set_attn_implementation(driven)

    def resident(self) -> AbstractContextManager[None]:
        """The weights are on the device: for several passes at once, each of which would move them by itself."""
        return nullcontext() if self.offload is None else self.offload.resident()

    @contextmanager
    def computing(self):
        """Autocast and, for a reference that shares its weights with a LoRA policy, the adapters off."""
        adapters = self.model.disable_adapter() if self.adapters_off else nullcontext()
        with (
            self.resident(),
            adapters,
            torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None),
        ):
            yield

    # ---- forward passes

    def backbone(self, tokens: torch.Tensor, positions: torch.Tensor, comb: attention.Comb) -> torch.Tensor:
        """[B,S] tokens of a comb -> last hidden states [B,S,H] of the model without its head."""
        out = self.causal_lm.base_model(
            input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, comb=comb
        )
        return out[0]

    def plain_states(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[R,S] tokens of plain right-padded rows -> last hidden states [R,S,H]; call it inside `plain()`."""
        return self.causal_lm.base_model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)[0]

    def states(
        self, layout: NestedPrefixLayout, tokens: torch.Tensor, teeth: torch.Tensor, layers: Sequence[int] | None
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Outputs of decoder layers over trunk [B,T,H] and teeth [B,K,N,G,H]; the last states as -1 for None."""
        self.check_positions(layout)

        def outputs(forward) -> dict[int, torch.Tensor]:
            return {-1: forward()} if layers is None else layer_outputs(forward, self._layers(), layers)

        recompute = self.checkpointing and layers is None and torch.is_grad_enabled()
        with recomputed(self._layers()) if recompute else nullcontext():
            if self.kernel == "rows":
                with self.plain():
                    return row_states(
                        lambda rows, real: outputs(partial(self.plain_states, rows, real)), layout, tokens, teeth
                    )
            comb = attention.Score(layout, kernel=self.kernel)
            with self.computing():
                row = layout.pack(tokens, teeth)
                found = outputs(partial(self.backbone, row, layout.positions(), comb))
        return {layer: layout.unpack(state) for layer, state in found.items()}

    def check_positions(self, layout: NestedPrefixLayout) -> None:
        """Raise UsageError if a text with its rollouts is too long for the model."""
        for limit, what in position_limits(self.causal_lm):
            if (longest := int(layout.positions().max()) + 1) > limit:
                raise UsageError(
                    f"{type(self.causal_lm).__name__} {what}, the text with its rollouts has {longest}:"
                    " give shorter sequences, or a shorter horizon"
                )

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's own head, with the scalings that some families apply to logits."""
        config = self.causal_lm.config.get_text_config()
        logits = self.causal_lm.get_output_embeddings()(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if getattr(config, "logits_scaling", None) is not None:  # Granite
            logits = logits / config.logits_scaling
        if getattr(config, "logit_scale", None) is not None:  # Cohere
            logits = logits * config.logit_scale
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        cap = getattr(config, "logits_soft_cap", None) if cap is None else cap  # RecurrentGemma
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def head_weight(self) -> torch.Tensor | None:
        """[V,H], if the head is a matrix and nothing else."""
        head = self.causal_lm.get_output_embeddings()
        plain = type(head) is nn.Linear and head.bias is None and not scales_logits(self.causal_lm.config)
        return head.weight if plain else None

    def _layers(self) -> nn.ModuleList:
        return decoder_layers(self.causal_lm)

    # ---- over combs

    sample = comb_sampling.sample
    score = comb_scoring.score
    hidden_states = comb_scoring.hidden_states
