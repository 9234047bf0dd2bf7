"""CausalPolicy: a transformers causal language model that samples, scores and embeds over combs.

The model is used as it is: the backbone up to its last hidden state with `ebft.attention` as its attention function,
then the head in chunks, so that no [tokens, vocabulary] tensor exists beyond a chunk. Dropout is never applied: the
log-probabilities of the scorer must be those of the sampler.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ebft import attention
from ebft.architectures import comb_differs, position_limit, refuse_unknown_head, why_not_a_comb
from ebft.draw import check_sampling, draw, is_truncated, keyed_uniform, sampling_log_probs
from ebft.errors import UsageError
from ebft.export import save_causal_lm
from ebft.head import Compare, chosen_log_probs, compared
from ebft.layout import NestedPrefixLayout
from ebft.loading import add_adapters, choose_device, choose_precision, load_causal_lm
from ebft.rows import row_states
from ebft.taps import layer_outputs, recomputed

# Options of configurations by which some families change their logits, see `CausalPolicy.logits`.
_LOGIT_SCALINGS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "logits_soft_cap")

# Kernels of a policy: those of a comb, and one plain forward pass per rollout.
KERNELS = (*attention.KERNELS, "rows")


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
        head_rows: rows of the head computed at once.

    Raises:
        UsageError: an encoder-decoder; a model that does something unknown to its logits; a kernel that is unknown or
            that the model cannot use.
    """

    def __init__(
        self,
        model: Any,
        tokenizer=None,
        *,
        autocast: torch.dtype | None = None,
        kernel: str | None = None,
        checkpointing: bool = False,
        head_rows: int = 128,
    ):
        self.model, self.tokenizer = model, tokenizer
        self.autocast, self.checkpointing, self.head_rows = autocast, checkpointing, head_rows
        self.causal_lm: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(self.causal_lm.config, "is_encoder_decoder", False):
            raise UsageError(f"{type(self.causal_lm).__name__} is an encoder-decoder: expected a causal language model")
        self._adapters_off = False
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
            options: `kernel`, `checkpointing`, `head_rows`.

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

    def _choose_kernel(self, kernel: str | None) -> str:
        if kernel is None:
            return "rows" if self.not_shared else attention.default_kernel(self.device)
        if kernel not in KERNELS:
            raise UsageError(f"kernel {kernel!r}: expected one of {', '.join(KERNELS)}")
        if self.not_shared and kernel != "rows":
            raise UsageError(f"kernel {kernel!r}: {self._cannot_share()}; use 'rows', or leave the kernel out")
        return kernel

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

    @contextmanager
    def computing(self):
        """Autocast and, for a reference that shares its weights with a LoRA policy, the adapters off."""
        adapters = self.model.disable_adapter() if self._adapters_off else nullcontext()
        with adapters, torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
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

    def _states(
        self, layout: NestedPrefixLayout, tokens: torch.Tensor, teeth: torch.Tensor, layers: Sequence[int] | None
    ) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Outputs of decoder layers over trunk [B,T,H] and teeth [B,K,N,G,H]; the last states as -1 for None."""
        self._check_positions(layout)

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

    def _check_positions(self, layout: NestedPrefixLayout) -> None:
        limit, longest = position_limit(self.causal_lm), int(layout.positions().max()) + 1
        if limit is not None and longest > limit:
            raise UsageError(
                f"{type(self.causal_lm).__name__} knows {limit} positions, the text with its rollouts has {longest}:"
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
        first: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw N rollouts of G tokens from every nested prefix, sharing the prefixes.

        Each token is computed once: T token-forwards (up to the last anchor) and K·N·(G-1) more, fewer when rollouts
        end early.

        Args:
            tokens, mask: [B,T] int64, bool; right-padded.
            anchors, anchor_mask: [B,K] int64, bool.
            rollouts, horizon: N, G.
            seed, sequence_ids: an integer or [B] int64, and [B] int64: with the anchor, the rollout and the step, the
                key of each random number; without `sequence_ids` the sequences are called 0..B-1.
            temperature, top_p, top_k, min_p: see `ebft.draw.sampling_log_probs`; temperature 0 is greedy.
            eos: token that ends a rollout; it counts, what follows is masked. None: rollouts never end early.
            document_ids: [B,T] int64; contexts stay inside their document.
            first: chooses the first tokens of an anchor's rollouts together, from log-probs [R,V] and uniform numbers
                [R,N] to tokens [R,N] (`ebft.samplers.first_tokens`); None draws them independently. `log_prob` is the
                policy's in any case.

        Returns:
            tokens [B,K,N,G] int64, log_prob [B,K,N,G] float32 (of the distribution really sampled from), mask
            [B,K,N,G] bool (False at masked anchors and after EOS); tokens and log-probs are 0 where it is False.

        Raises:
            UsageError: the model cannot share prefixes, a setting is out of range, or the text is too long for it.
        """
        self.require_shared()
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        check_sampling(**settings)
        batch, count = anchors.shape
        if sequence_ids is None:
            sequence_ids = torch.arange(batch, device=tokens.device)
        # nobody sees what follows the last anchor
        length = int(torch.where(anchor_mask, anchors, 1).max())
        tokens, document_ids = tokens[:, :length], None if document_ids is None else document_ids[:, :length]
        layout = NestedPrefixLayout(
            anchors, anchor_mask, length=length, rollouts=rollouts, horizon=horizon, document_ids=document_ids
        )
        self._check_positions(layout)
        drawn = torch.zeros(batch, count, rollouts, horizon, dtype=torch.int64, device=tokens.device)
        log_prob = torch.zeros(drawn.shape, device=tokens.device)
        alive = torch.zeros(drawn.shape, dtype=torch.bool, device=tokens.device)
        first_position = layout.unpack(layout.positions())[1][..., 0].flatten()
        # the live rollouts, as places of the flat [B*K*N]
        live = anchor_mask[:, :, None].expand(-1, -1, rollouts).flatten().nonzero()[:, 0]
        with self.computing():
            prefill = attention.Prefill(layout)
            states = self.backbone(tokens, layout.positions()[:, :length], prefill)
            # at step 0 the N rollouts of an anchor share one distribution, afterwards each has its own
            rows, columns = anchor_mask.nonzero(as_tuple=True)
            states, shared = states[rows, layout.anchors[rows, columns] - 1], rollouts
            for step in range(horizon):
                uniform = keyed_uniform(seed, sequence_ids, layout.anchors, rollouts=rollouts, step=step)
                numbers = uniform.flatten()[live].view(-1, shared)
                token, chosen = self._draw(states, numbers, settings, None if step else first)
                token, chosen = token.flatten(), chosen.flatten()
                for whole, new in ((drawn, token), (log_prob, chosen.float()), (alive, torch.ones_like(live).bool())):
                    whole.view(-1, horizon)[live, step] = new
                keep = torch.ones_like(live, dtype=torch.bool) if eos is None else token != eos
                live = live[keep]
                if step == horizon - 1 or not len(live):
                    break
                if step == 0:
                    decode = attention.Decode(layout, prefill.kept, live)
                else:
                    decode.advance(keep)
                states = self.backbone(token[keep][None], (first_position[live] + step)[None], decode)[0]
                shared = 1
        return drawn, log_prob, alive

    def _draw(
        self,
        hidden: torch.Tensor,
        uniform: torch.Tensor,
        settings: dict,
        choose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden rows [R,H] and Q uniform numbers for each [R,Q] -> tokens and their log-probs [R,Q]."""

        def tokens_of(rows: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if choose is None:
                return draw(self.logits(rows), numbers, **settings)
            log_probs = sampling_log_probs(self.logits(rows), **settings)
            tokens = choose(log_probs, numbers)
            return tokens, log_probs.gather(-1, tokens)

        parts = zip(hidden.split(self.head_rows), uniform.split(self.head_rows), strict=True)
        drawn = [tokens_of(rows, numbers) for rows, numbers in parts]
        return torch.cat([tokens for tokens, _ in drawn]), torch.cat([log_probs for _, log_probs in drawn])

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
        entropy: bool = False,
        reference: CausalPolicy | None = None,
        divergence: Compare | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Log-probabilities of all rollouts and of the sequence itself in one pass, with gradient.

        The last token of a rollout predicts nothing, so a row holds T + K·N·(G-1) tokens.

        Args:
            tokens, mask, anchors, anchor_mask: as in `sample`.
            rollout_tokens, rollout_mask: [B,K,N,G] int64, bool.
            temperature, top_p, top_k, min_p: as in `sample`, for the rollouts: with the sampler's settings the
                log-probs are those that it recorded; a token that truncation drops has -inf.
            document_ids: [B,T] int64; contexts stay inside their document.
            entropy: also return the entropy of the distribution that each rollout token was drawn from.
            divergence: also return this function of the distribution that each rollout token was drawn from and that
                of `reference`, over the whole vocabulary: logits [R,V] of both, over the temperature, to [R]
                (`ebft.objectives.exact_kl`). No more than `head_rows` rows of logits exist at a time, in backward too.

        Returns:
            log_prob [B,K,N,G] float32, 0 where `rollout_mask` is False;
            token_log_prob [B,T-1] float32: of tokens[:, 1:] at temperature 1, 0 where the predicted token is padding;
            with `entropy`, entropy [B,K,N,G] float32 in nats, with gradient, 0 where `rollout_mask` is False;
            with `divergence`, it as [B,K,N,G] float32, with gradient for this policy, 0 where `rollout_mask` is False.

        Raises:
            UsageError: a setting out of range, or a `divergence` without a `reference` or of truncated distributions.
        """
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
        check_sampling(**settings)
        if divergence is not None:
            self._check_divergence(reference, settings)
        _, _, rollouts, horizon = rollout_tokens.shape
        layout = NestedPrefixLayout(
            anchors,
            anchor_mask,
            length=tokens.shape[1],
            rollouts=rollouts,
            horizon=horizon - 1,
            document_ids=document_ids,
        )
        real = rollout_mask & anchor_mask[:, :, None, None]
        trunk, teeth = self._states(layout, tokens, rollout_tokens[..., :-1], None)[-1]
        with self.computing():
            rows, columns = anchor_mask.nonzero(as_tuple=True)
            at_anchors = trunk[rows, layout.anchors[rows, columns] - 1]
            first, first_entropy = self._select(at_anchors, rollout_tokens[rows, columns, :, 0], settings, entropy)
            later_real = real[..., 1:]
            later, later_entropy = self._select(
                teeth[later_real], rollout_tokens[..., 1:][later_real][:, None], settings, entropy
            )
            known = mask[:, 1:]
            own, _ = self._select(trunk[:, :-1][known], tokens[:, 1:][known][:, None], {}, False)

        def whole(at_first: torch.Tensor, at_later: torch.Tensor) -> torch.Tensor:
            start = at_first.new_zeros(rollout_tokens.shape[:3]).index_put((rows, columns), at_first)
            rest = at_later.new_zeros(later_real.shape).masked_scatter(later_real, at_later)
            return torch.where(real, torch.cat([start[..., None], rest], -1), 0.0)

        results = (whole(first, later[:, 0]), own.new_zeros(known.shape).masked_scatter(known, own[:, 0]))
        if entropy:
            spread = first_entropy[:, None].expand(-1, rollouts)  # type: ignore[index]
            results = (*results, whole(spread, later_entropy))  # type: ignore[arg-type, assignment]
        if divergence is not None and reference is not None:
            with torch.no_grad():
                their_trunk, their_teeth = reference._states(layout, tokens, rollout_tokens[..., :-1], None)[-1]
            theirs = their_trunk[rows, layout.anchors[rows, columns] - 1], their_teeth[later_real]
            at_first, at_later = (
                self._compare(divergence, states, reference, other, temperature)
                for states, other in zip((at_anchors, teeth[later_real]), theirs, strict=True)
            )
            results = (*results, whole(at_first[:, None].expand(-1, rollouts), at_later))  # type: ignore[assignment]
        return results

    def _check_divergence(self, reference: CausalPolicy | None, settings: dict) -> None:
        if reference is None:
            raise UsageError("divergence compares with a reference policy: give one")
        if is_truncated(settings):
            raise UsageError(
                f"divergence of distributions truncated by {settings}: a token that one of the two drops makes it"
                " infinite; score with top_p=1 and without top_k and min_p"
            )
        if reference._adapters_off and hasattr(self.causal_lm.get_output_embeddings(), "base_layer"):
            raise UsageError("divergence from the start of a policy with adapters on its head is not supported")

    def _compare(
        self,
        function: Compare,
        hidden: torch.Tensor,
        reference: CausalPolicy,
        reference_hidden: torch.Tensor,
        temperature: float,
    ) -> torch.Tensor:
        """`function` of the next-token distributions at hidden states [R,H] of both policies: [R]."""
        if not hidden.numel():
            return hidden.sum(-1, dtype=torch.float32)
        with self.computing():
            return compared(
                function,
                self.logits,
                hidden,
                reference.logits,
                reference_hidden,
                rows=self.head_rows,
                temperature=temperature,
            )

    def _select(
        self, hidden: torch.Tensor, tokens: torch.Tensor, settings: dict, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Hidden states [R,H] and Q tokens for each [R,Q] -> log-probs [R,Q] and entropies [R], the head in chunks."""
        if not hidden.numel():
            nothing = hidden.sum(-1, dtype=torch.float32)  # of the graph, so that a backward pass finds it
            return nothing[:, None].expand(tokens.shape), nothing
        return chosen_log_probs(
            self.logits,
            hidden,
            tokens,
            rows=self.head_rows,
            settings=settings,
            weight=self._head_weight(),
            entropy=entropy,
        )

    def _head_weight(self) -> torch.Tensor | None:
        """The head's weight, if the head is a matrix and nothing else."""
        head, config = self.causal_lm.get_output_embeddings(), self.causal_lm.config.get_text_config()
        scaled = any(getattr(config, name, None) is not None for name in _LOGIT_SCALINGS)
        return head.weight if type(head) is nn.Linear and head.bias is None and not scaled else None

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
        states = self._states(layout, tokens, rollout_tokens, layers)
        return {i: teeth for i, (_, teeth) in states.items()}, {i: trunk for i, (trunk, _) in states.items()}
