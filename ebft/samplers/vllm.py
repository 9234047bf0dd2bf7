"""Rollouts drawn by a vLLM server, for whole answers of large models, behind the contract of `CausalPolicy.sample`.

Token ids go there and come back; log-probs are computed by the policy itself, whose rounding is that of training. The
server is vLLM's OpenAI-compatible one (`vllm serve FOLDER`), in a version whose completions know `return_token_ids`;
putting new weights into it wants `VLLM_SERVER_DEV_MODE=1`. Nothing of vLLM is imported.

Tested against a small server that speaks the same protocol; never yet against vLLM itself.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ebft.draw import check_sampling
from ebft.errors import UsageError
from ebft.files import write_folder_atomically
from ebft.layout import document_starts
from ebft.policy import CausalPolicy


@dataclass(frozen=True)
class Server:
    """Where vLLM listens.

    Args:
        url: as http://localhost:8000.
        model: the name that it serves the model under, the folder it was started with as a rule.
        timeout: seconds for one answer; connections: requests at a time.
    """

    url: str
    model: str
    timeout: float = 600.0
    connections: int = 64

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """What the server answers to a request, read as JSON; None for an empty answer.

        Raises:
            UsageError: it cannot be reached, or refuses; repeats what it said.
        """
        request = urllib.request.Request(
            self.url.rstrip("/") + path,
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                content = answer.read()
        except urllib.error.HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise UsageError(f"the server {self.url} refuses {path} ({error.code}): {said}") from error
        except OSError as error:
            raise UsageError(
                f"the server {self.url} does not answer {path}: {error}. Start it with `vllm serve {self.model}`"
            ) from error
        return json.loads(content) if content.strip() else None


@torch.no_grad()
def sample(
    server: Server,
    policy: CausalPolicy,
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
    """Draw rollouts as `CausalPolicy.sample` does, by a server that holds the same weights; see `put_weights`.

    One request for each rollout, with a seed that its place, sequence and the run's seed determine: what is drawn does
    not depend on how a batch was split. The server draws other tokens than this project does from the same seed.

    Args: as in `CausalPolicy.sample`; `policy` computes the log-probs.

    Returns:
        tokens [B,K,N,G] int64, log_prob [B,K,N,G] float32 (of the policy, under the same settings: -inf for a token
        that truncation drops here and not there), mask [B,K,N,G] bool; 0 where masked.

    Raises:
        UsageError: a setting is out of range, or the server refuses or answers something else than token ids.
    """
    settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p}
    check_sampling(**settings)
    batch, count = anchors.shape
    ids = torch.arange(batch) if sequence_ids is None else sequence_ids
    seeds = seed.tolist() if isinstance(seed, torch.Tensor) else [seed] * batch
    starts = document_starts(tokens, document_ids).tolist()
    texts, places = tokens.tolist(), anchors.tolist()
    options = {
        "model": server.model,
        "max_tokens": horizon,
        "n": 1,
        "return_token_ids": True,
        "skip_special_tokens": False,
        **_distribution(settings, eos),
    }

    def draw(place: tuple[int, int, int]) -> list[int]:
        b, k, n = place
        anchor = places[b][k]
        prompt = texts[b][starts[b][anchor - 1] : anchor]
        own = hash((seeds[b], int(ids[b]), anchor, n)) & (2**31 - 1)
        return _drawn(server.post("/v1/completions", {**options, "prompt": prompt, "seed": own}), horizon, eos)

    wanted = [(b, k, n) for b, k in anchor_mask.nonzero().tolist() for n in range(rollouts)]
    found = torch.zeros(batch, count, rollouts, horizon, dtype=torch.int64)
    real = torch.zeros(found.shape, dtype=torch.bool)
    with ThreadPoolExecutor(server.connections) as pool:
        for place, answer in zip(wanted, pool.map(draw, wanted), strict=True):
            found[place][: len(answer)] = torch.tensor(answer, dtype=torch.int64)
            real[place][: len(answer)] = True
    found, real = found.to(tokens.device), real.to(tokens.device)
    given = tokens, mask, anchors, anchor_mask, found, real
    return found, policy.score(*given, **settings, document_ids=document_ids)[0], real


def put_weights(server: Server, policy: CausalPolicy, folder: Path) -> None:
    """Give the server the policy's weights, and have it forget the keys and values of the old ones.

    Args:
        folder: what the server was started with; it is replaced.

    Raises:
        UsageError: the folder cannot be written, or the server refuses: without VLLM_SERVER_DEV_MODE=1 it does.
    """
    write_folder_atomically(folder, policy.save_pretrained)
    server.post("/collective_rpc", {"method": "reload_weights"})
    server.post("/reset_prefix_cache", {})


def _distribution(settings: Mapping[str, Any], eos: int | None) -> dict[str, Any]:
    """All that says what a token is drawn from and where a rollout ends.

    What a request leaves out the server takes from the model's generation_config.json, where there may be a top-k, a
    penalty of repetition, or further tokens to end at: so nothing is left out, and no end but `eos` is known there.
    """
    return {
        "temperature": settings["temperature"],
        "top_p": settings["top_p"],
        "top_k": -1 if settings["top_k"] is None else settings["top_k"],
        "min_p": settings["min_p"] or 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
        "ignore_eos": True,
        "stop_token_ids": [] if eos is None else [eos],
    }


def _drawn(answer: Any, horizon: int, eos: int | None) -> list[int]:
    """The tokens of a completion, the EOS that it ended with included."""
    try:
        (choice,) = answer["choices"]
        drawn = list(map(int, choice["token_ids"]))
        reason, stopped_at = choice["finish_reason"], choice.get("stop_reason")
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"the server answered no token ids: {str(answer)[:300]}. It has to be a vLLM whose completions know"
            " return_token_ids"
        ) from error
    if reason == "stop" and (eos is None or stopped_at not in (None, eos)):
        wanted = "no token" if eos is None else f"token {eos}"
        raise UsageError(f"the server stopped at {stopped_at!r} after {len(drawn)} tokens, and was told to at {wanted}")
    if reason == "stop" and drawn[-1:] != [eos]:
        drawn.append(eos)  # type: ignore[arg-type]  # the server may leave out what it stopped at
    if reason not in ("stop", "length") or not 0 < len(drawn) <= horizon:
        raise UsageError(f"the server drew {len(drawn)} tokens and ended with {reason!r}; expected 1 to {horizon}")
    return drawn
