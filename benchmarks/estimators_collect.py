"""Rollouts of a policy with their features and the projected gradient of their log-probability, kept as memmaps.

The gradient is that of log p(rollout | context) by the weights of all linear layers but the head, where they act at the
positions that predict rollout tokens: keys and values of the context stay as they are, so that the gradients of all
rollouts of a context come out of one backward pass. Of each gradient `projections` numbers are kept, uᵀ G v summed over
the layers' gradients G with Gaussian u and v (fixed by the seed): on average over u and v their squares and products
are those of the gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from ebft import schema
from ebft.components import choose, resolve_options
from ebft.data import load_documents, pack
from ebft.errors import UsageError
from ebft.files import write_folder_atomically, write_json
from ebft.layout import NestedPrefixLayout
from ebft.policy import CausalPolicy
from ebft.samplers.anchors import strided, targets

FIRST, STRIDE = 16, 16  # anchors of a sequence


def collect(
    folder: Path,
    *,
    policy: str,
    data: str,
    features: tuple[str, ...],
    sequences: int,
    length: int,
    horizon: int,
    rollouts: int,
    projections: int,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """Write FOLDER/sequence-NNN for every sequence that is not there yet; see :func:`load` for what they hold.

    Raises:
        UsageError: `folder` holds rollouts that were made with other settings, or there is too little text.
    """
    config = {name: value for name, value in locals().items() if name not in ("folder", "say")}
    config["features"] = list(features)
    known = folder / "config.json"
    before = json.loads(known.read_text()) if known.is_file() else config
    if before | {"sequences": sequences} != config or before["sequences"] > sequences:
        raise UsageError(
            f"{folder} holds rollouts made with other settings ({known}): give another folder, or let --sequences"
            " alone grow"
        )
    names = [folder / f"sequence-{number:03d}" for number in range(sequences)]
    if before == config and all(name.is_dir() for name in names):
        return
    model = CausalPolicy.from_pretrained(policy, device="cpu", dtype="float32")
    model.model.requires_grad_(False)
    rows = pack(load_documents(data), model.tokenizer, length=length)
    if len(rows) < sequences:
        raise UsageError(f"data {data} gives {len(rows)} sequences of {length} tokens: expected {sequences} or more")
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:sequences]]
    maps = {
        name: choose("features", name).build(model, model, **resolve_options({"features": name}, {})["features"]).embed
        for name in features
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(known, config)
    project = Projections(model, count=projections, seed=seed)
    for number, name in enumerate(names):
        if name.is_dir():
            continue
        say(f"rollouts of sequence {number + 1} of {sequences}")
        td = _sequence(model, maps, project, rows[number : number + 1], horizon, rollouts, seed)
        write_folder_atomically(name, lambda path, td=td: td.memmap(path))


def load(folder: Path) -> tuple[TensorDict, dict[str, Any]]:
    """The rollouts of all sequences, batch size [sequences, K], and how they were made.

    Entries: scores [sequences,K,N,P]; rollout_tokens, rollout_mask [...,N,G]; per feature map ("features", name)
    [...,N,D] and ("targets", name) [...,D].

    Raises:
        UsageError: there are none, or not all.
    """
    known = folder / "config.json"
    if not known.is_file():
        raise UsageError(f"{folder} holds no rollouts (no config.json): make them with --collect")
    config = json.loads(known.read_text())
    names = [folder / f"sequence-{number:03d}" for number in range(config["sequences"])]
    missing = [name.name for name in names if not name.is_dir()]
    if missing:
        raise UsageError(f"{folder} lacks {', '.join(missing)}: go on with --collect")
    return torch.stack([TensorDict.load_memmap(name).to_tensordict() for name in names]), config


def _sequence(policy, maps, project, row, horizon: int, rollouts: int, seed: int) -> TensorDict:
    tokens, mask, documents = (row[key] for key in (schema.TOKENS, schema.MASK, schema.DOCUMENT_IDS))
    place = {"stride": STRIDE, "first": FIRST, "horizon": horizon}
    anchors, anchor_mask = strided(mask, **place)  # over document borders: every sequence has as many
    target, target_mask = targets(tokens, mask, anchors, anchor_mask, horizon=horizon)
    drawn, _, alive = policy.sample(
        tokens, mask, anchors, anchor_mask,
        rollouts=rollouts, horizon=horizon, seed=seed, sequence_ids=row[schema.SEQUENCE_IDS],
        eos=policy.tokenizer.eos_token_id, document_ids=documents,
    )  # fmt: skip
    batch = (tokens, mask, anchors, anchor_mask, drawn, alive)
    embedded = {name: made(*batch, target, target_mask, document_ids=documents) for name, made in maps.items()}
    scores = project(*batch, document_ids=documents)
    return TensorDict(
        {
            "scores": scores[0],
            "rollout_tokens": drawn[0],
            "rollout_mask": alive[0],
            "features": TensorDict({name: found[0][0] for name, found in embedded.items()}, [anchors.shape[1]]),
            "targets": TensorDict({name: found[1][0] for name, found in embedded.items()}, [anchors.shape[1]]),
        },
        [anchors.shape[1]],
    )


class Projections:
    """Projected gradients of the log-probabilities of rollouts, see the head of this module.

    Args:
        policy: its weights frozen, in float32.
        count: P, numbers kept of each gradient; seed: of u and v.
    """

    def __init__(self, policy: CausalPolicy, *, count: int, seed: int):
        self.policy, self.count = policy, count
        random = torch.Generator().manual_seed(seed)
        self._ways: dict[nn.Linear, tuple[Tensor, Tensor]] = {}
        for module in policy.causal_lm.base_model.modules():
            if isinstance(module, nn.Linear):
                out, into = (torch.randn(size, count, generator=random) for size in module.weight.shape)
                self._ways[module] = (out / count**0.5, into)

    def __call__(self, tokens, mask, anchors, anchor_mask, rollout, rollout_mask, *, document_ids) -> Tensor:
        """[B,K,N,P] of rollouts [B,K,N,G]; 0 where the anchor is masked."""
        # one token of the context moves into the rollouts, so that what predicts a rollout is its own row of tokens
        last = tokens.gather(1, anchors - 1)[:, :, None, None].expand(*rollout.shape[:3], 1)
        longer = torch.cat([last, rollout], -1)
        alive = torch.cat([rollout_mask[..., :1], rollout_mask], -1)
        layout = NestedPrefixLayout(
            anchors - 1, anchor_mask, length=tokens.shape[1], rollouts=rollout.shape[2], horizon=rollout.shape[3]
        )
        found = torch.zeros(*rollout.shape[:3], self.count)
        with self._watched(layout, found), torch.enable_grad():
            log_prob, _ = self.policy.score(
                tokens, mask, anchors - 1, anchor_mask, longer, alive, document_ids=document_ids
            )
            log_prob[..., 1:].sum().backward()
        return torch.where(anchor_mask[:, :, None, None], found, 0.0)

    @contextmanager
    def _watched(self, layout: NestedPrefixLayout, found: Tensor) -> Iterator[None]:
        def forward(module: nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            along, across = self._ways[module]
            seen = layout.unpack(inputs[0].detach() @ across)[1]  # [B,K,N,G,P]

            def backward(gradient: Tensor) -> None:
                found.add_((layout.unpack(gradient @ along)[1] * seen).sum(3))

            output.register_hook(backward)

        def needs_gradient(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return output.requires_grad_()

        hooks = [module.register_forward_hook(forward) for module in self._ways]
        hooks.append(self.policy.causal_lm.get_input_embeddings().register_forward_hook(needs_gradient))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
