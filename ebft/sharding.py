"""Weights, gradients and optimizer states cut into one share per process: FSDP2 (`torch.distributed.fsdp`).

Gathering weights and reducing gradients is work that all processes do together, so all have to make the same sequence
of calls. Two ways of running a policy keep to that:

* `whole`: all weights are gathered at once and let go at the end. Nothing inside is done together, so what depends on
  the data (steps of decoding, passes that end early, processes without rows) may differ. Sampling, embedding and every
  measurement run so.
* `ShardedModel.forward`: one pass with gradient, each layer gathered when it is its turn, in forward and in backward,
  and its gradient summed over the processes and cut as soon as backward leaves it. All processes make equally many of
  these passes, which `ebft.loops.numbers.own_parts` sees to, and each calls every layer once. (Under autocast backward
  keeps the weights of all layers as they were cast, as it does of a model that is not sharded; not with checkpointing.)
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ebft.distributed import check_same, size
from ebft.errors import UsageError

if TYPE_CHECKING:
    from ebft.policy import CausalPolicy

Result = TypeVar("Result")


class _Root(nn.Module):
    """What FSDP takes for the whole model: its forward pass is any function of it, head and all."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Result]) -> Result:
        return function()


class ShardedModel:
    """The model of a policy, of which each process keeps its share of every weight.

    Each decoder layer is gathered by itself; what is outside of them (embeddings, last norm, head) goes together.

    Args:
        model: sharded in place; its parameters are `DTensor` from here on.
        layers: its decoder layers.
        like: where the weights of a `model` without any come from (see `skeleton`), one group of them at a time.
    """

    def __init__(self, model: nn.Module, layers: Iterable[nn.Module], *, like: ShardedModel | None = None):
        self._skeleton: nn.Module = with_parameters(model, _meta(model)) if like is None else like._skeleton
        dtypes = [weight.dtype for weight in model.parameters() if weight.requires_grad]
        trained, half = bool(dtypes), any(dtype.itemsize < 4 for dtype in dtypes)
        kind = next(model.parameters()).device.type
        mesh: DeviceMesh = init_device_mesh(kind, (size(),)) if like is None else like._mesh
        policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if half else None)
        fill = None if like is None else like._filler(model)
        options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "fill": fill}
        self._mesh: DeviceMesh = mesh
        self._layers = [_sharded(layer, reshard_after_forward=True, **options) for layer in layers]
        # of a trained model the rest stays from the forward pass to the end of backward: the head's is computed twice
        self._root = _sharded(_Root(model), reshard_after_forward=not trained, **options)
        self._trained = trained
        self._prefetch()
        self._users = 0
        with torch.no_grad():
            self._root(lambda: None)  # torch takes the first to run for the whole
        # gathered once while all weights require the gradient that they are to get
        with self.whole():
            pass

    def _prefetch(self) -> None:
        """Gather a layer while the one before it computes. Said of each, nothing depends on what ran before."""
        order = [self._root, *self._layers]
        for module, following in pairwise(order):
            module.set_modules_to_forward_prefetch([following])
            following.set_modules_to_backward_prefetch([module])
        self._root.set_modules_to_backward_prefetch([self._layers[-1]])

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights are there inside, for passes without gradient; all processes enter and leave alike."""
        modules = [self._root, *self._layers]
        if not self._users:
            for module in modules:
                module.set_reshard_after_forward(False, recurse=False)
                module.unshard()
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                for module in modules:
                    module.reshard()
                    kept = module is self._root and self._trained
                    module.set_reshard_after_forward(not kept, recurse=False)
                self._forget()

    @contextmanager
    def whole_head(self) -> Iterator[None]:
        """What is outside of the layers is there inside, for logits that are computed again in backward."""
        self._root.unshard()
        try:
            yield
        finally:
            self._root.reshard()
            if not self._trained:
                self._forget()

    def forward(self, function: Callable[..., Result], *inputs: Any, **options: Any) -> Result:
        """`function` as a forward pass; all processes call it alike, and it calls every layer once."""
        if self._users:
            return function(*inputs, **options)
        found = self._root(lambda: function(*inputs, **options))
        if not self._trained:
            self._forget()
        return found

    def _forget(self) -> None:
        """Drop what FSDP notes of every pass until a backward pass comes: here none does. (Not before torch 2.13.)"""
        if hasattr(self._root, "reset_iter_state"):
            self._root.reset_iter_state()

    def skeleton(self) -> nn.Module:
        """A frozen copy of the model without its weights, to be sharded `like` this one."""
        return copy.deepcopy(self._skeleton).requires_grad_(False)

    def _filler(self, model: nn.Module) -> Callable[[nn.Module], None]:
        """What gives the modules of a skeleton the weights of this model; all processes call it."""
        names = {id(weight): name for name, weight in model.named_parameters()}
        made: dict[str, nn.Parameter] = {}  # so that tied weights stay tied

        def fill(module: nn.Module) -> None:
            for part in module.modules():
                for key, weight in part.named_parameters(recurse=False, remove_duplicate=False):
                    if weight.is_meta:
                        name = names[id(weight)]
                        if name not in made:
                            full = self._root.model.get_parameter(name).detach().full_tensor()
                            made[name] = nn.Parameter(full, requires_grad=False)
                        part.register_parameter(key, made[name])
            made.clear()

        return fill

    def on_first(self, *, first: bool) -> nn.Module | None:
        """A plain copy of the model on the CPU for the `first` process, None for the others; all call it."""
        found = {}
        for name, weight in self._root.model.named_parameters():
            full = weight.detach().full_tensor()
            if first:
                found[name] = full.cpu()
        return with_parameters(self._skeleton, found).cpu() if first else None


def shard(policy: CausalPolicy) -> None:
    """Shard a policy in place over the processes that have joined; its `reference()` is then sharded, too.

    Raises:
        UsageError: it is scored by the kernel `rows`, or the processes have different weights.
    """
    if policy.kernel == "rows":
        raise UsageError(
            "--shard: the kernel 'rows' makes as many forward passes as the data wants, and of sharded weights all"
            " processes have to make the same. Leave --shard out"
            + (f": {policy.not_shared}" if policy.not_shared else ", or use --attention chunked or flex")
        )
    check_same(policy.model.parameters(), 0, what=f"the weights of {type(policy.causal_lm).__name__}")
    policy.sharded = ShardedModel(policy.model, policy._layers())


@contextmanager
def whole(*policies: CausalPolicy | None) -> Iterator[None]:
    """All weights of `policies` are there inside, see `ShardedModel.whole`; nothing for those that are not sharded."""
    with ExitStack() as stack:
        for policy in policies:
            if policy is not None and policy.sharded is not None:
                stack.enter_context(policy.sharded.whole())
        yield


def whole_head(policy: CausalPolicy | None) -> AbstractContextManager[None]:
    """See `ShardedModel.whole_head`; nothing for a policy that is not sharded."""
    return nullcontext() if policy is None or policy.sharded is None else policy.sharded.whole_head()


def run_whole(stage: Any, *policies: CausalPolicy) -> Any:
    """A stage of a pipeline with all weights of the `policies` that it runs, in each of its methods."""
    return stage if all(policy.sharded is None for policy in policies) else _Gathered(stage, policies)


class _Gathered:
    def __init__(self, stage: Any, policies: Sequence[CausalPolicy]):
        self._stage, self._policies = stage, policies

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        with whole(*self._policies):
            return self._stage(*inputs, **options)

    def __getattr__(self, name: str) -> Any:
        return _Gathered(getattr(self._stage, name), self._policies)


def local(tensor: Tensor) -> Tensor:
    """This process's share of a sharded tensor; any other one as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def cut(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor in the shares and on the device of `like`, which is sharded or not; nothing is sent."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """Clip to the norm `max_norm` of all gradients together, and give their norm: a scalar on every process."""
    norm = nn.utils.clip_grad_norm_(parameters, max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def with_parameters(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model that has `weights` as its parameters, by name; its own are not copied, tied ones stay tied."""
    made = {
        id(own): nn.Parameter(weights[name], requires_grad=own.requires_grad) for name, own in model.named_parameters()
    }
    return copy.deepcopy(model, made)


def _meta(model: nn.Module) -> dict[str, Tensor]:
    """Weights without content."""
    return {name: torch.empty_like(weight, device="meta") for name, weight in model.named_parameters()}


def _sharded(module: nn.Module, *, fill: Callable[[nn.Module], None] | None, **options: Any) -> Any:
    if fill is not None:
        fill(module)
    sharded: Any = fully_shard(module, **options)
    # each process's terms are divided by the counts of the whole batch: gradients are summed, as every backend can
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    if hasattr(sharded, "set_reduce_scatter_unused_params"):  # torch 2.13: experts that no token of a process chose
        sharded.set_reduce_scatter_unused_params(True, recurse=False)
    return sharded
