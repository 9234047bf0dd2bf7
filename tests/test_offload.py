"""Frozen weights in CPU memory: where they are when, and that nothing else changes."""

import gc
import io
import weakref

import pytest
import torch
from rich.console import Console

from ebft.assemble import plan_from_options
from ebft.assemble import policy as assemble_policy
from ebft.assemble.checks import resolve_run, settle
from ebft.assemble.pipeline import build_features
from ebft.errors import UsageError
from ebft.loading import add_adapters
from ebft.offload import Offload, frozen_copy
from ebft.planning import plan as planning
from ebft.planning.memory import measure_rates
from ebft.planning.speed import Device
from ebft.policy import CausalPolicy
from tests.combs import comb
from tests.models import NAMES, tiny
from tests.runs import go, metrics

CPU = torch.device("cpu")


def addresses(model):
    return [weight.data_ptr() for weight in model.parameters()]


@pytest.fixture
def moves(monkeypatch):
    """Every stay on the device: the addresses of the weights before, there and after."""
    seen, resident = [], Offload.resident

    def recording(self):
        before = [w.data_ptr() for w in self._weights]
        context = resident(self)

        class Recorded:
            def __enter__(inner):
                context.__enter__()
                inner.there = [w.data_ptr() for w in self._weights]

            def __exit__(inner, *error):
                context.__exit__(*error)
                if not self._users:
                    seen.append((before, inner.there, [w.data_ptr() for w in self._weights]))

        return Recorded()

    monkeypatch.setattr(Offload, "resident", recording)
    return seen


@pytest.mark.parametrize("name", NAMES)
def test_an_offloaded_reference_scores_and_embeds_what_one_that_stays_does(name):
    staying, away = (CausalPolicy(tiny(name), offload_frozen=offload).reference() for offload in (False, True))
    batch = comb()
    home = addresses(away.model)
    for run in (
        lambda policy: policy.score(*batch),
        lambda policy: policy.hidden_states(*batch, layers=[0, policy.num_layers])[0],
        lambda policy: policy.sample(*batch[:4], rollouts=2, horizon=3, seed=1),
    ):
        with torch.no_grad():
            ours, theirs = run(away), run(staying)
        assert torch.equal(torch.cat([x.flatten().double() for x in as_list(ours)]),
                           torch.cat([x.flatten().double() for x in as_list(theirs)]))  # fmt: skip
        assert addresses(away.model) == home


def as_list(found):
    return list(found.values()) if isinstance(found, dict) else list(found)


def test_weights_come_once_for_what_is_inside_and_leave_nothing():
    model = frozen_copy(tiny("llama"))
    offload, home = Offload(model, CPU), addresses(model)
    with offload.resident():
        there = addresses(model)
        with offload.resident():
            assert addresses(model) == there
        assert addresses(model) == there
        assert not set(there) & set(home)
        weight = next(model.parameters())
        storages = [weakref.ref(w.untyped_storage()) for w in model.parameters()]
        assert weight.untyped_storage().data_ptr() == there[0]
    gc.collect()
    assert addresses(model) == home
    assert not any(storage() for storage in storages)
    with pytest.raises(KeyError), offload.resident():
        raise KeyError
    assert addresses(model) == home


def test_the_copy_is_made_in_cpu_memory_and_keeps_ties():
    model = tiny("llama", tie_word_embeddings=True)
    copied = frozen_copy(model)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert not set(addresses(copied)) & set(addresses(model))
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(map(torch.equal, copied.parameters(), model.parameters()))
    with Offload(copied, CPU).resident():
        assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    on_gpu = []
    with pytest.MonkeyPatch.context() as patch:
        # what lies on a GPU, which no CPU has: pinned is asked for, and the copy is made there
        patch.setattr(torch.Tensor, "is_cuda", True)
        patch.setattr(torch, "empty_like", lambda w, **options: on_gpu.append(options) or torch.zeros(w.shape))
        frozen_copy(tiny("llama"))
    assert on_gpu
    assert all(options == {"device": "cpu", "pin_memory": True} for options in on_gpu)


def test_a_policy_with_adapters_shares_its_weights():
    adapted = CausalPolicy(add_adapters(tiny("llama"), rank=2, seed=0), offload_frozen=True)
    reference = adapted.reference()
    assert reference.offload is None
    assert reference.model is adapted.model


@pytest.mark.parametrize("backbone", ["start", "random"])
def test_a_run_is_the_same_and_moves_the_weights_for_each_stage_alone(options, tmp_path, monkeypatch, moves, backbone):
    """On a CPU, told that it is a GPU: whole runs, to the last bit."""
    options = {**options, "steps": 2, "features": "hidden", "backbone": backbone, "save_every": 2}
    go(options, tmp_path / "staying")
    assert moves == []
    monkeypatch.setattr(assemble_policy, "choose_device", lambda name: torch.device("cuda"))
    go({**options, "offload_reference": True}, tmp_path / "away")
    assert metrics(tmp_path / "away") == metrics(tmp_path / "staying")
    for before, there, after in moves:
        assert before == after
        assert not set(there) & set(before)
    # embedding and scoring of 2 steps, the latter in 2 parts; before and after, with profile: 3 horizons each
    assert len(moves) == 2 * (1 + 2) + 2 * 3 + 1


def test_the_backbone_comes_once_for_a_batch(options, monkeypatch, moves):
    chosen = {**options, "features": "hidden", "backbone": "random"}
    policy = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32", offload_frozen=True)
    features = build_features(policy, policy.reference(), settle(chosen), resolve_run(chosen)).embed
    *batch, rollout, rollout_mask = comb()
    targets = rollout[:, :, 0], rollout_mask[:, :, 0]
    features(*batch, rollout, rollout_mask, *targets)
    assert len(moves) == 1


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({}, "--offload-reference: the device is cpu"),
        ({"device": "gpu", "lora": 4}, "--offload-reference: with --lora 4 the start is the policy itself"),
        ({"device": "gpu", "kl_mode": "exact"}, "--offload-reference: --kl-mode exact wants the head"),
    ],
    ids=str,
)
def test_where_there_is_nothing_to_move_it_is_said(options, monkeypatch, chosen, message):
    if chosen.pop("device", None):
        monkeypatch.setattr(assemble_policy, "choose_device", lambda name: torch.device("cuda"))
    with pytest.raises(UsageError) as caught:
        resolve_run({**options, "offload_reference": True, **chosen})
    assert str(caught.value).startswith(message)


def test_a_divergence_that_wants_the_head_in_backward_refuses():
    policy = CausalPolicy(tiny("llama"), offload_frozen=True)
    with pytest.raises(UsageError, match="its weights cannot be offloaded"):
        policy.score(*comb(), reference=policy.reference(), divergence=lambda ours, theirs: ours.sum(-1))


def test_the_plan_moves_the_copy_from_what_is_held_to_the_stages(options, monkeypatch):
    monkeypatch.setattr(Device, "seconds", lambda self, run: 1.0)

    known = {}

    def rates(config, kind):
        if kind not in known:
            known[kind] = measure_rates(config, kind)
        return known[kind]

    monkeypatch.setattr(planning, "measure_rates", rates)

    def plan(**chosen):
        console = Console(file=io.StringIO(), width=100)
        found = plan_from_options({**options, "features": "hidden", **chosen}, processes=1, console=console)
        return found, console.file.getvalue()

    staying, said = plan()
    assert "in CPU memory" not in said
    monkeypatch.setattr(assemble_policy, "choose_device", lambda name: torch.device("cuda"))
    away, said = plan(offload_reference=True)
    size = staying.parts["frozen copy"]
    assert size == staying.parts["weights"]
    assert away.offloaded["frozen copy"] == size
    assert "frozen copy" not in away.parts
    assert "in CPU memory: frozen copy 0.00 GiB" in said
    assert away.stages["embed"] == pytest.approx(staying.stages["embed"] + size)
    assert staying.stages["score"] <= away.stages["score"] <= staying.stages["score"] + size
    own, _ = plan(backbone="random", offload_reference=True)
    assert own.offloaded == {"frozen copy": size, "feature backbone": size}
    captured, _ = plan(decode="graph")
    assert staying.parts["decoding graphs"] == 0
    # 2 layers of 2 heads of 8 for keys and for values, in float32; K = 3, N = 3, G = 4; batches of 3 and of 6 rows
    assert captured.parts["decoding graphs"] == 2 * 2 * 8 * 2 * 4 * (3 + 6) * (32 + 3 * 3 * (4 - 1))
    named, _ = plan(backbone=options["policy"])
    assert named.parts["feature backbone"] == size
    adapted, _ = plan(backbone="random", lora=2)
    assert adapted.parts["frozen copy"] == 0
    assert adapted.parts["feature backbone"] == size
