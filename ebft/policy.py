"""CausalPolicy: a transformers causal language model that samples, scores and embeds over combs.

The model is used as it is: the backbone up to its last hidden state with `ebft.attention` as its attention function,
then the head in chunks, so that no [tokens, vocabulary] tensor exists beyond a chunk. Dropout is never applied: the
log-probabilities of the scorer must be those of the sampler.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebft import attention
from ebft.architectures import check_against_plain_forward, refuse_unservable
from ebft.draw import check_sampling, inverse_cdf, keyed_uniform, sampling_log_probs, until_eos
from ebft.errors import UsageError
from ebft.export import save_causal_lm
from ebft.head import chosen_log_probs
from ebft.layout import NestedPrefixLayout
from ebft.loading import add_adapters, choose_device, choose_precision, load_causal_lm

# Options of configurations by which some families change their logits, see `CausalPolicy.logits`.
_LOGIT_SCALINGS = ("logits_scaling", "logit_scale", "final_logit_softcapping")


class CausalPolicy:
    """Any transformers causal LM with standard attention layers, driven over nested prefixes.

    Args:
        model: a transformers causal LM, or one wrapped by peft. From here on its attention belongs to this policy;
            `plain()` gives it back for a while.
        tokenizer: optional, for those who need text.
        autocast: compute dtype of forward passes (weights stay as they are), None for the weights' own.
        kernel: attention kernel of `score` and `hidden_states`, see `ebft.attention.Score`.
        head_rows: rows of the head computed at once.

    Raises:
        UsageError: the model has layers (linear attention, state space) or an attention that cannot be served.
    """

    def __init__(
        self,
        model: Any,
        tokenizer=None,
        *,
        autocast: torch.dtype | None = None,
        kernel: str = "chunked",
        head_rows: int = 512,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.autocast, self.kernel, self.head_rows = autocast, kernel, head_rows
        self.causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._adapters_off = False
        refuse_unservable(self.causal_lm)
        model.eval()
        self._plain_attention = self.causal_lm.config._attn_implementation
        self.causal_lm.set_attn_implementation(attention.NAME)
        check_against_plain_forward(self)

    @classmethod
    def from_pretrained(
        cls, name: str, *, device: str = "auto", dtype: str = "auto", lora: int | None = None, seed: int = 0, **options
    ) -> CausalPolicy:
        """Load a policy.

        Args:
            name: an embedded name (`smollm2-135m`), a folder or a hub id.
            device: `auto`, `cpu`, `cuda`, `cuda:N`.
            dtype: `auto` (float32 weights, bfloat16 compute where the hardware has it; with adapters the frozen
                weights are kept in bfloat16) or a torch dtype's name for weights and compute.
            lora: rank of LoRA adapters, None for full fine-tuning; `seed` draws their start.
            options: `kernel`, `head_rows`.

        Raises:
            UsageError: anything that cannot be loaded, chosen or served.
        """
        chosen = choose_device(device)
        weights, autocast = choose_precision(dtype, chosen)
        frozen = autocast if lora and autocast else weights
        model, tokenizer = load_causal_lm(name, weights=frozen, device=chosen)
        if lora:
            model = add_adapters(model, rank=lora, seed=seed, autocast=autocast is not None)
        return cls(model, tokenizer, autocast=autocast, **options)

    # ---- what it is made of

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def num_layers(self) -> int:
        return len(self._layers())

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that training changes, by name: all of them, or the adapters' only."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def reference(self) -> CausalPolicy:
        """The policy as it is now, frozen: a copy; with fresh LoRA adapters the same weights with the adapters off."""
        frozen = copy.copy(self)
        if hasattr(self.model, "disable_adapter"):
            frozen._adapters_off = True
            return frozen
        frozen.model = frozen.causal_lm = copy.deepcopy(self.causal_lm).requires_grad_(False)
        return frozen

    def save_pretrained(self, path) -> None:
        """Write the policy as a plain Hugging Face folder, adapters merged; see `ebft.export.save_causal_lm`."""
        save_causal_lm(self.model, self.tokenizer, Path(path))

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        """The model with its own attention, for plain forward passes and `generate`."""
        self.causal_lm.set_attn_implementation(self._plain_attention)
        try:
            with self.computing():
                yield self.model
        finally:
            self.causal_lm.set_attn_implementation(attention.NAME)

    @contextmanager
    def computing(self):
        """Autocast and, for a reference that shares its weights with a LoRA policy, the adapters off."""
        adapters = self.model.disable_adapter() if self._adapters_off else nullcontext()
        with adapters, torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            yield

    # ---- forward passes over a comb

    def backbone(self, tokens: torch.Tensor, positions: torch.Tensor, comb) -> torch.Tensor:
        """[B,S] tokens -> last hidden states [B,S,H] of the model without its head."""
        out = self.causal_lm.base_model(
            input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, comb=comb
        )
        return out[0]

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
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _layers(self) -> nn.ModuleList:
        wanted = self.causal_lm.config.get_text_config().num_hidden_layers
        for module in self.causal_lm.base_model.modules():
            if isinstance(module, nn.ModuleList) and len(module) == wanted:
                return module
        raise UsageError(f"{type(self.causal_lm).__name__}: no list of {wanted} decoder layers found")

    # ---- sampling

    @torch.no_grad()
    def sample(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        anchors: torch.Tensor,
        anchor_mask: torch.Tensor,
        *,
        rollouts: int,
        horizon: int,
        seed: int | torch.Tensor,
        sequence_ids: torch.Tensor | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float | None = None,
        eos: int | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw N rollouts of G tokens from every nested prefix; T + K·N·(G-1) token-forwards per sequence.

        Args:
            tokens, mask: [B,T] int64, bool; right-padded.
            anchors, anchor_mask: [B,K] int64, bool.
            rollouts, horizon: N, G.
            seed, sequence_ids: an integer or [B] int64, and [B] int64: with the anchor, the rollout and the step, the
                key of each random number; without `sequence_ids` the sequences are called 0..B-1.
            temperature, top_p, top_k, min_p: see `ebft.draw.sampling_log_probs`; temperature 0 is greedy.
            eos: token that ends a rollout; it counts, what follows is masked. None: rollouts never end early.
            document_ids: [B,T] int64; contexts stay inside their document.

        Returns:
            tokens [B,K,N,G] int64, log_prob [B,K,N,G] float32 (of the distribution really sampled from; 0 where
            masked), mask [B,K,N,G] bool (False at masked anchors and after EOS).
        """
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        check_sampling(**settings)
        batch, count = anchors.shape
        if sequence_ids is None:
            sequence_ids = torch.arange(batch, device=tokens.device)
        layout = NestedPrefixLayout(
            anchors, anchor_mask, length=tokens.shape[1], rollouts=rollouts, horizon=horizon, document_ids=document_ids
        )
        positions = layout.positions()
        with self.computing():
            prefill = attention.Prefill(layout)
            hidden = self.backbone(tokens, positions[:, : layout.length], prefill)
            decode = attention.Decode(layout, prefill.kept)
            hidden = hidden.gather(1, (layout.anchors - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
            first_position = layout.unpack(positions)[1][..., 0].flatten(1)
            drawn, log_probs = [], []
            for step in range(horizon):
                uniform = keyed_uniform(seed, sequence_ids, layout.anchors, rollouts=rollouts, step=step)
                # at step 0 the N rollouts of an anchor share one distribution, afterwards each has its own
                rows = uniform if step == 0 else uniform.unsqueeze(-1)
                token, log_prob = self._draw(hidden.flatten(0, -2), rows.flatten(0, -2), settings)
                drawn.append(token.view(batch, count, rollouts))
                log_probs.append(log_prob.view(batch, count, rollouts))
                if step < horizon - 1:
                    hidden = self.backbone(drawn[-1].flatten(1), first_position + step, decode)
                    decode.advance()
        rollout_tokens, log_prob = torch.stack(drawn, -1), torch.stack(log_probs, -1)
        rollout_mask = until_eos(rollout_tokens, eos) & anchor_mask[:, :, None, None]
        return rollout_tokens, log_prob.masked_fill(~rollout_mask, 0.0), rollout_mask

    def _draw(self, hidden: torch.Tensor, uniform: torch.Tensor, settings: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden rows [R,H] and Q uniform numbers for each [R,Q] -> tokens and their log-probs [R,Q]."""
        tokens, log_probs = [], []
        for rows, numbers in zip(hidden.split(self.head_rows), uniform.split(self.head_rows), strict=True):
            row_log_probs = sampling_log_probs(self.logits(rows), **settings)
            tokens.append(inverse_cdf(row_log_probs, numbers))
            log_probs.append(row_log_probs.gather(-1, tokens[-1]))
        return torch.cat(tokens), torch.cat(log_probs)

    # ---- scoring

    def score(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        anchors: torch.Tensor,
        anchor_mask: torch.Tensor,
        rollout_tokens: torch.Tensor,
        rollout_mask: torch.Tensor,
        *,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float | None = None,
        document_ids: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probabilities of all rollouts and of the sequence itself in one pass, with gradient.

        The last token of a rollout predicts nothing, so a row holds T + K·N·(G-1) tokens.

        Args:
            tokens, mask: [B,T]; anchors, anchor_mask: [B,K].
            rollout_tokens, rollout_mask: [B,K,N,G].
            temperature, top_p, top_k, min_p: those of the sampler; they shape the rollouts' log-probs only.
            document_ids: [B,T] int64; contexts stay inside their document.

        Returns:
            log_prob [B,K,N,G] float32, 0 where `rollout_mask` is False;
            token_log_prob [B,T-1] float32: of tokens[:, 1:] at temperature 1, 0 where the predicted token is padding.
        """
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        check_sampling(**settings)
        _, _, rollouts, horizon = rollout_tokens.shape
        layout = NestedPrefixLayout(
            anchors,
            anchor_mask,
            length=tokens.shape[1],
            rollouts=rollouts,
            horizon=horizon - 1,
            document_ids=document_ids,
        )
        with self.computing():
            row = layout.pack(tokens, rollout_tokens[..., :-1])
            comb = attention.Score(layout, kernel=self.kernel)
            trunk, teeth = layout.unpack(self.backbone(row, layout.positions(), comb))
            at_anchors = trunk.gather(1, (layout.anchors - 1)[..., None].expand(-1, -1, trunk.shape[-1]))
            first = self._select(at_anchors, rollout_tokens[..., 0], settings)  # [B,K,N]
            later = self._select(teeth, rollout_tokens[..., 1:, None], settings)[..., 0]  # [B,K,N,G-1]
            token_log_prob = self._select(trunk[:, :-1], tokens[:, 1:, None], {})[..., 0]
        log_prob = torch.cat([first[..., None], later], -1)
        return (
            torch.where(rollout_mask & anchor_mask[:, :, None, None], log_prob, 0.0),
            torch.where(mask[:, 1:], token_log_prob, 0.0),
        )

    def _select(self, hidden: torch.Tensor, tokens: torch.Tensor, settings: dict) -> torch.Tensor:
        """Hidden states [...,H] and Q tokens for each [...,Q] -> their log-probs [...,Q], the head in chunks."""
        if not hidden.numel():
            return hidden.new_zeros(tokens.shape, dtype=torch.float32)
        return chosen_log_probs(
            self.logits, hidden, tokens, rows=self.head_rows, settings=settings, weight=self._frozen_head()
        )

    def _frozen_head(self) -> torch.Tensor | None:
        """The head's weight, if the head is a frozen matrix and nothing else."""
        head, config = self.causal_lm.get_output_embeddings(), self.causal_lm.config.get_text_config()
        scaled = any(getattr(config, name, None) is not None for name in _LOGIT_SCALINGS)
        plain = type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad and not scaled
        return head.weight if plain else None

    # ---- hidden states

    @torch.no_grad()
    def hidden_states(
        self,
        tokens: torch.Tensor,
        mask: torch.Tensor,
        anchors: torch.Tensor,
        anchor_mask: torch.Tensor,
        rollout_tokens: torch.Tensor,
        rollout_mask: torch.Tensor,
        *,
        layers: Sequence[int],
        document_ids: torch.Tensor | None = None,
    ) -> tuple[dict[int, torch.Tensor], dict[int, torch.Tensor]]:
        """Outputs of decoder layers for the sequence and all its rollouts, in one pass of T + K·N·G tokens.

        Layer i is the output of the i-th decoder layer (1-based), 0 the embeddings; the final norm is not applied and
        the pass stops after the deepest layer asked for.

        Args: as in `score`, and `layers`: layer indices.

        Returns:
            layer -> [B,K,N,G,H] of the rollouts, layer -> [B,T,H] of the sequence, in the compute dtype.

        Raises:
            UsageError: a layer outside [0, number of layers].
        """
        wrong = [layer for layer in layers if not 0 <= layer <= self.num_layers]
        if wrong or not layers:
            raise UsageError(f"layers {list(layers)}: expected one or more of 0 (embeddings) to {self.num_layers}")
        _, _, rollouts, horizon = rollout_tokens.shape
        layout = NestedPrefixLayout(
            anchors, anchor_mask, length=tokens.shape[1], rollouts=rollouts, horizon=horizon, document_ids=document_ids
        )
        seen: dict[int, torch.Tensor] = {}
        handles = [self._tap(layer, seen, last=layer == max(layers)) for layer in set(layers)]
        try:
            with self.computing():
                comb = attention.Score(layout, kernel=self.kernel)
                self.backbone(layout.pack(tokens, rollout_tokens), layout.positions(), comb)
        except _DeepEnough:
            pass
        finally:
            for handle in handles:
                handle.remove()
        split = {layer: layout.unpack(seen[layer]) for layer in layers}
        return {i: teeth for i, (_, teeth) in split.items()}, {i: trunk for i, (trunk, _) in split.items()}

    def _tap(self, layer: int, seen: dict[int, torch.Tensor], *, last: bool):
        """Record what leaves decoder layer `layer` (what enters the first, for 0); stop the pass there if `last`."""

        def record(state):
            seen[layer] = state
            if last:
                raise _DeepEnough

        if layer == 0:
            return self._layers()[0].register_forward_pre_hook(
                lambda module, args, kwargs: record(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
            )
        return self._layers()[layer - 1].register_forward_hook(
            lambda module, args, out: record(out[0] if isinstance(out, tuple) else out)
        )


class _DeepEnough(Exception):
    """Raised inside a forward pass once the deepest layer asked for has been seen."""
