"""Decoding with static shapes, compiled or as one CUDA graph: every step of a batch runs the same kernels.

Rollouts that have ended stay, masked, where `ebft.comb_sampling` leaves them out; own keys and values have buffers for
the whole horizon; the trunk is padded to one of few lengths, the anchors to one of few numbers. So no step waits for
the host to learn what is left, and batches with other anchors and ends run what the first one compiled. The engine with
shrinking shapes is the oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from torch.nn.functional import pad

from ebft.attention.flex import bucketed
from ebft.attention.static import StaticDecode
from ebft.draw import draw, keyed_uniform
from ebft.errors import UsageError
from ebft.static_state import State

if TYPE_CHECKING:
    from ebft.policy import CausalPolicy

DECODES = ("eager", "compile", "graph")

BACKEND = "inductor"  # of torch.compile
_CAPTURED = 8  # graphs that are kept, each with buffers of its own: training and held-out, by parts of few lengths
_COMPILED = 64  # graphs for as many shapes; more are an error
LEAST_DRAWN = 8  # that the rows of a draw are multiples of
_LOOK_EVERY = 16  # steps after which the host asks whether all rollouts have ended


def advance(policy: CausalPolicy, state: State) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [R,H] after the last tokens, and the uniform numbers [R,1] of the next ones."""
    layout = state.layout
    columns = layout.count * layout.rollouts
    device = state.step.device
    first = layout.length + torch.arange(columns, device=device) * layout.horizon
    query = (first + state.step)[None, :, None]  # [1,C,1]
    rows = torch.arange(layout.batch, device=device)[:, None, None]
    trunk = torch.arange(layout.length, device=device)[None, None]
    own = first[None, :, None] + torch.arange(layout.horizon - 1, device=device)
    hidden = {
        window: tuple(~layout.visible(query, keys, row=rows, window=window) for keys in (trunk, own))
        for window in state.windows
    }
    comb = StaticDecode(state.trunk, state.own, hidden, state.step)  # type: ignore[arg-type]
    states = policy.backbone(state.token[None], (state.position + state.step)[None], comb)[0]
    keys = state.seed, state.sequence_ids, layout.anchors
    return states, keyed_uniform(*keys, rollouts=layout.rollouts, step=state.step + 1).flatten()[:, None]


def pick(policy: CausalPolicy, hidden: torch.Tensor, uniform: torch.Tensor, settings: dict[str, Any]):
    """Hidden states [Q,H] and uniform numbers [Q,1] -> tokens and log-probs [Q]."""
    token, log_prob = draw(policy.logits(hidden), uniform, **settings)
    return token[:, 0], log_prob[:, 0]


def record(state: State, token: torch.Tensor, log_prob: torch.Tensor, eos: int | None) -> None:
    """Write what was drawn [R] into the results, and go on to the next step."""
    state.step.add_(1)
    state.token.copy_(torch.where(state.live, token, 0))
    at = state.step[None]
    state.drawn.index_copy_(1, at, state.token[:, None])
    state.log_prob.index_copy_(1, at, torch.where(state.live, log_prob.float(), 0.0)[:, None])
    state.alive.index_copy_(1, at, state.live[:, None])
    if eos is not None:
        state.live.logical_and_(token != eos)


class StaticDecoder:
    """Runs the steps of a batch after its first tokens.

    Args:
        policy: whose steps they are.
        mode: ``compile``: by torch.compile; ``graph``: as one CUDA graph.

    Attributes:
        graphs: how many were compiled or captured.
    """

    def __init__(self, policy: CausalPolicy, mode: str):
        self._policy, self._mode, self.graphs = policy, mode, 0
        compiled = partial(torch.compile, fullgraph=True, dynamic=False, backend=self._compile)
        self._compiled = {function: compiled(function) for function in (advance, pick)}
        self._known: set[tuple] = set()
        self._captured: dict[tuple, tuple[State, Callable[[], None]]] = {}

    def run(self, state: State, settings: dict[str, Any], eos: int | None) -> State:
        """Draw the other tokens; call it inside `policy.computing()`.

        Returns:
            The state with the results, which the next batch may overwrite.

        Raises:
            UsageError: a model that cannot be compiled or captured whole, or whose weights are sharded.
            RuntimeError: torch would compile again what it compiled before.
        """
        if self._policy.sharded is not None:
            raise UsageError(f"decode {self._mode!r}: the weights of a sharded policy change their places; use 'eager'")
        if state.layout.horizon == 1:
            return state  # the first tokens are all, and there is no step to capture
        key = (*state.key(), tuple(settings.items()), eos)
        step: Callable[[], None] = partial(self._step, key, state, settings, eos)
        if self._mode == "graph":
            state, step = self._graph(key, state, step)
        for number in range(1, state.layout.horizon):
            step()
            if eos is not None and number % _LOOK_EVERY == 0 and not state.live.any():
                break
        return state

    def _step(self, key: tuple, state: State, settings: dict[str, Any], eos: int | None) -> None:
        hidden, uniform = self._run(advance, key, state)
        draws = -(-len(hidden) // self._policy.head_rows)
        rows = min(self._policy.head_rows, bucketed(-(-len(hidden) // draws), least=LEAST_DRAWN))
        parts = zip(*(pad(x, (0, 0, 0, -len(x) % rows)).split(rows) for x in (hidden, uniform)), strict=True)
        drawn = [self._run(pick, (rows, key[-2]), *part, settings) for part in parts]
        token, log_prob = (torch.cat(found)[: len(hidden)] for found in zip(*drawn, strict=True))
        record(state, token, log_prob, eos)

    def _run(self, function: Callable, key: tuple, *args: Any) -> Any:
        """The function, compiled for what `key` stands for when it is first met, and never again."""
        if self._mode == "graph":  # which is captured from the functions as they are
            return function(self._policy, *args)
        if (function, key) in self._known:
            with torch.compiler.set_stance("fail_on_recompile"):
                return self._compiled[function](self._policy, *args)
        try:
            with torch._dynamo.config.patch(recompile_limit=_COMPILED):
                result = self._compiled[function](self._policy, *args)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            raise
        except torch._dynamo.exc.TorchDynamoException as error:
            raise self._refused("compiled", error) from error
        self._known.add((function, key))
        return result

    def _compile(self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable:
        self.graphs += 1
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)

    def _graph(self, key: tuple, state: State, step: Callable[[], None]) -> tuple[State, Callable[[], None]]:
        """The state whose tensors the graph of these shapes reads, with the values of `state`, and its replay."""
        if key in self._captured:
            held, replay = self._captured[key] = self._captured.pop(key)  # the last of them is the last used
            held.load(state)
            return held, replay
        if len(self._captured) == _CAPTURED:
            del self._captured[next(iter(self._captured))]
        try:
            self._captured[key] = (state, capture(step, state.changed()))
        except RuntimeError as error:
            raise self._refused("captured", error) from error
        self.graphs += 1
        return self._captured[key]

    def _refused(self, what: str, error: Exception) -> UsageError:
        reason = str(error).strip().splitlines()[0]
        return UsageError(
            f"decode {self._mode!r}: {type(self._policy.causal_lm).__name__} cannot be {what} whole ({reason}). Use"
            " 'eager'"
        )


def capture(step: Callable[[], None], changed: Sequence[torch.Tensor]) -> Callable[[], None]:
    """The replay of a CUDA graph of `step`; the tensors that it changes are afterwards what they were before."""
    before = [x.clone() for x in changed]
    casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)  # a graph would go on reading casts that were made for this batch
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what libraries do once they do before
            step()
            for x, value in zip(changed, before, strict=True):
                x.copy_(value)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # a thread of `ebft.loops.overlap` may be at work on the device meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    finally:
        torch.set_autocast_cache_enabled(casts)
    return graph.replay
