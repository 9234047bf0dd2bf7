"""Decoding with static shapes: the rollouts of the engine with shrinking shapes, and how often something is compiled.

torch's front end decides what is compiled anew, and it is the same on every device; what it hands on runs as it is.
CUDA graphs are stood in for by a function that runs the captured step again on the tensors that it was captured with.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from ebft import static_decode, static_state
from ebft.assemble.checks import resolve_run
from ebft.errors import UsageError
from ebft.loading import add_adapters
from ebft.policy import CausalPolicy
from tests.models import NAMES, VOCABULARY, tiny

EOS = 2


@pytest.fixture(autouse=True)
def _compiler(monkeypatch):
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(static_decode, "BACKEND", "eager")
    yield
    torch._dynamo.reset()


def batch(seed=0, *, reach=12, width=16, count=3):
    """Two rows, anchors in no order up to `reach`, one masked."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, VOCABULARY, (2, width), generator=random)
    anchors = torch.stack([torch.randperm(reach, generator=random)[:count] + 1 for _ in range(2)])
    anchors[0, 0] = reach
    anchor_mask = torch.ones(2, count, dtype=torch.bool)
    anchor_mask[seed % 2, -1] = False
    return tokens, torch.ones_like(tokens, dtype=torch.bool), anchors, anchor_mask


def documents(seed=0, width=16):
    return (torch.arange(width) >= 5 + seed % 3).long().expand(2, -1)


def same(ours, theirs):
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])
    torch.testing.assert_close(ours[1], theirs[1], atol=3e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_draws_the_same_rollouts(name):
    options = {"rollouts": 3, "horizon": 5, "seed": 5, "eos": EOS}
    policy = CausalPolicy(tiny(name), decode="compile", head_rows=4)
    oracle = CausalPolicy(tiny(name))
    for seed, ids in ((0, None), (1, documents())):
        ours, theirs = (p.sample(*batch(seed), **options, document_ids=ids) for p in (policy, oracle))
        same(ours, theirs)
        assert 0.3 < ours[2].float().mean() < 0.95
    assert policy.static.graphs == counters["stats"]["unique_graphs"] == 2  # a step, and the draw of 4 rows


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_k": 7, "min_p": 0.02},
        {"top_p": 0.8},
        {"temperature": 0},
        {"seed": torch.tensor([3, 8])},
    ],
    ids=str,
)
def test_settings_of_the_distribution_and_seeds_of_rows(settings):
    options = {"rollouts": 2, "horizon": 4, "seed": 9, "eos": EOS, "sequence_ids": torch.tensor([77, 5]), **settings}
    ours, theirs = (CausalPolicy(tiny(), decode=decode).sample(*batch(), **options) for decode in ("compile", "eager"))
    same(ours, theirs)


def test_first_tokens_chosen_together_one_token_and_no_end():
    def choose(log_probs, uniform):
        return log_probs.topk(uniform.shape[-1], -1).indices

    policies = [CausalPolicy(tiny(), decode=decode) for decode in ("compile", "eager")]
    for options in ({"horizon": 4, "first": choose}, {"horizon": 1, "eos": EOS}):
        same(*(policy.sample(*batch(), rollouts=2, seed=1, **options) for policy in policies))
    assert policies[0].sample(*batch(), rollouts=2, seed=1, horizon=4)[2][0, 0].all()


def test_adapters_and_half_precision():
    options = {"rollouts": 2, "horizon": 4, "seed": 5, "eos": EOS}
    adapted = [CausalPolicy(add_adapters(tiny(), rank=2, seed=0), decode=decode) for decode in ("compile", "eager")]
    for policy in adapted:
        for name, weight in policy.trainable().items():
            weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name))) / 4
    same(*(policy.sample(*batch(), **options) for policy in adapted))
    rounded = [CausalPolicy(tiny(), autocast=torch.bfloat16, decode=decode) for decode in ("compile", "eager")]
    drawn = [policy.sample(*batch(), **options) for policy in rounded]
    together = (drawn[0][0] == drawn[1][0]).flatten(0, 2).cumprod(-1).bool().view(drawn[0][0].shape)
    assert together.float().mean() > 0.8  # rounding may turn a draw, and all that follows it
    assert (drawn[0][1] - drawn[1][1])[together & drawn[0][2]].abs().max() < 0.2


def test_nothing_is_compiled_again_for_other_ends_lengths_seeds_and_weights():
    policy, oracle = CausalPolicy(tiny("mistral-window"), decode="compile"), CausalPolicy(tiny("mistral-window"))
    ended = set()
    for seed, reach, count in ((0, 12, 3), (1, 9, 4), (2, 16, 2), (3, 13, 3), (4, 10, 4)):
        given, options = batch(seed, reach=reach, count=count), {"rollouts": 3, "horizon": 6, "seed": seed, "eos": EOS}
        ours = policy.sample(*given, **options, document_ids=documents(seed))
        same(ours, oracle.sample(*given, **options, document_ids=documents(seed)))
        ended.add(int(ours[2].sum()))
        assert policy.static.graphs == counters["stats"]["unique_graphs"] == 2
        for each in (policy, oracle):  # a step of training
            for parameter in each.trainable().values():
                parameter.data += 0.01 * parameter.data.sign()
                parameter.grad = torch.zeros_like(parameter)
    assert len(ended) == 5
    policy.sample(*batch(), rollouts=2, horizon=6, seed=0)  # another N: a step and a draw of its own
    assert policy.static.graphs == 4
    assert not counters["graph_break"]


@pytest.mark.parametrize("lora", [0, 2])
def test_what_a_step_of_training_does_in_between_compiles_nothing_again(lora):
    """Scoring with recomputation and backward, the start's scores and its states, which with adapters share layers."""
    model = add_adapters(tiny(), rank=lora, seed=0) if lora else tiny()
    policy = CausalPolicy(model, decode="compile", checkpointing=True)
    start, options = policy.reference(), {"rollouts": 2, "horizon": 4}
    for seed in (0, 1):
        drawn, _, alive = policy.sample(*batch(seed), **options, seed=seed)
        log_prob, own = policy.score(*batch(seed), drawn, alive, reference=start)[:2]
        start.hidden_states(*batch(seed), drawn, alive, layers=[1, 2])
        (log_prob.sum() + own.sum()).backward()
    assert policy.static.graphs == counters["stats"]["unique_graphs"] == 2


def test_lengths_and_numbers_of_anchors_fall_into_few_buckets():
    assert [static_state.anchor_count(n) for n in (1, 2, 4, 5, 33, 127)] == [1, 4, 4, 8, 36, 128]
    assert [static_state.trunk_length(n, 1024) for n in (1, 64, 65, 130, 1000)] == [64, 64, 128, 192, 1024]
    assert static_state.trunk_length(40, 48) == 48
    assert len({static_state.trunk_length(n, 1024) for n in range(1, 1025)}) == 16
    policy = CausalPolicy(tiny(), decode="compile")
    options = {"rollouts": 2, "horizon": 3, "seed": 0}
    for reach, graphs in ((20, 2), (60, 2), (64, 2), (65, 3), (80, 3), (30, 3)):
        policy.sample(*batch(reach=reach, width=100), **options)
        assert policy.static.graphs == graphs


def test_compiling_again_in_silence_is_an_error(monkeypatch):
    policy = CausalPolicy(tiny(), decode="compile")
    options = {"rollouts": 2, "horizon": 4, "seed": 0}
    policy.sample(*batch(), **options)
    changed = policy.causal_lm.base_model.layers[0].self_attn
    monkeypatch.setattr(changed, "scaling", changed.scaling * 2)  # compiled in as a number
    with pytest.raises(RuntimeError, match="recompil"):
        policy.sample(*batch(), **options)


def test_a_break_in_the_graph_is_an_error(monkeypatch):
    def breaking(*args, **options):
        torch._dynamo.graph_break()
        return draw(*args, **options)

    draw = static_decode.draw
    monkeypatch.setattr(static_decode, "draw", breaking)
    policy = CausalPolicy(tiny(), decode="compile")
    with pytest.raises(UsageError, match="LlamaForCausalLM cannot be compiled whole"):
        policy.sample(*batch(), rollouts=2, horizon=3, seed=0)


def test_the_host_looks_for_the_end_only_now_and_then(monkeypatch):
    monkeypatch.setattr(static_decode, "_LOOK_EVERY", 3)
    few = {"vocab_size": 6, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    policy, oracle = (CausalPolicy(tiny(**few), decode=decode) for decode in ("compile", "eager"))
    tokens, *rest = batch()
    options = {"rollouts": 2, "horizon": 100, "seed": 1, "eos": EOS, "temperature": 5.0}
    steps, step = [], static_decode.StaticDecoder._step
    monkeypatch.setattr(static_decode.StaticDecoder, "_step", lambda self, *args: steps.append(1) or step(self, *args))
    ours, theirs = (p.sample(tokens % 6, *rest, **options) for p in (policy, oracle))
    same(ours, theirs)
    longest = int(ours[2].sum(-1).max())
    assert longest < 90
    assert longest - 1 <= len(steps) < longest + 3
    assert len(steps) % 3 == 0


def on_gpu(monkeypatch, model):
    """A policy that captures graphs."""
    policy = CausalPolicy(model)
    policy.static = static_decode.StaticDecoder(policy, "graph")
    return policy


def test_a_captured_step_serves_batches_of_its_shapes(monkeypatch, captured):
    policy, oracle = on_gpu(monkeypatch, tiny("gemma2")), CausalPolicy(tiny("gemma2"))
    drawn = []
    for seed, reach in ((0, 12), (1, 9), (2, 16)):
        given, options = batch(seed, reach=reach), {"rollouts": 3, "horizon": 6, "seed": seed, "eos": EOS}
        options["document_ids"] = documents(seed)
        drawn.append((policy.sample(*given, **options), oracle.sample(*given, **options)))
    for ours, theirs in drawn:  # none was overwritten by a later one
        same(ours, theirs)
    assert len(captured) == policy.static.graphs == 1
    assert not counters["stats"]["unique_graphs"]
    monkeypatch.setattr(static_decode, "_CAPTURED", 4)
    for rollouts in (1, 2, 4, 1, 5, 6, 1):
        policy.sample(*batch(), rollouts=rollouts, horizon=3, seed=0)
    policy.sample(*batch(), rollouts=1, horizon=1, seed=0)  # there is no step
    assert policy.static.graphs == 6  # that of one rollout is still there: others were used longer ago
    assert len(policy.static._captured) == 4


def test_what_cannot_be_captured_is_refused_by_name(monkeypatch):
    def capture(step, changed):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(static_decode, "capture", capture)
    with pytest.raises(UsageError, match=r"decode 'graph': LlamaForCausalLM cannot be captured whole \(CUDA error: op"):
        on_gpu(monkeypatch, tiny()).sample(*batch(), rollouts=2, horizon=3, seed=0)


def test_a_policy_that_cannot_refuses():
    with pytest.raises(UsageError, match="decode 'graph': the device is cpu"):
        CausalPolicy(tiny(), decode="graph")
    with pytest.raises(UsageError, match="decode 'fast': expected one of eager, compile, graph"):
        CausalPolicy(tiny(), decode="fast")
    for name in ("bloom", "qwen3_5_text"):
        with pytest.raises(UsageError, match=r"decode 'compile': \w+ForCausalLM cannot share a prefix"):
            CausalPolicy(tiny(name), decode="compile")
    policy = CausalPolicy(tiny(), decode="compile")
    assert policy.reference().static is None
    policy.sharded = object()
    with pytest.raises(UsageError, match="decode 'compile': the weights of a sharded policy change their places"):
        policy.sample(*batch(), rollouts=2, horizon=3, seed=0)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"decode": "quick"}, "--decode quick: expected one of eager, compile, graph"),
        ({"decode": "graph"}, "--decode graph: CUDA graphs are of GPUs"),
        ({"decode": "compile", "shard": True}, "--decode compile with --shard: weights that are gathered"),
        ({"decode": "compile", "sampler": "snapshot"}, "--decode compile: --sampler snapshot has no steps"),
    ],
    ids=str,
)
def test_options_that_do_not_apply_are_refused(options, chosen, message):
    with pytest.raises(UsageError) as caught:
        resolve_run({**options, **chosen})
    assert str(caught.value).startswith(message)
