"""Features at several horizons out of one pass, against embedding the first tokens anew."""

import dataclasses
from functools import partial

import pytest
import torch

from ebft.data import load_documents, pack
from ebft.errors import UsageError
from ebft.features import as_module, at_horizons, pooling
from ebft.features.hidden import hidden
from ebft.features.join import join
from ebft.features.match import match
from ebft.features.ngram import ngram
from ebft.features.sbert import sbert
from ebft.loops.evaluate import evaluate
from ebft.loops.evaluation.rollouts import measure_rollouts
from ebft.policy import CausalPolicy
from ebft.samplers import anchors
from ebft.samplers.component import sampler
from tests.models import tiny
from tests.runs import parts
from tests.test_features_contract import LetterEncoder, Letters, make_batch

HORIZONS = (1, 2, 3, 5)


def anew(feature_map, batch, g, **options):
    """The first g tokens of rollouts and targets, embedded by themselves."""
    cut = dataclasses.replace(
        batch,
        rollout_tokens=batch.rollout_tokens[:, :, :, :g],
        rollout_mask=batch.rollout_mask[:, :, :, :g],
        target_tokens=batch.target_tokens[:, :, :g],
        target_mask=batch.target_mask[:, :, :g],
    )
    return cut.embed(feature_map, **options)


def check(feature_map, batch, *, atol=3e-7, **options):
    """All entries, at masked anchors and of ended rollouts too.

    `atol` is for states in float64 and vectors of norm 2 or less, which are rounded to float32.
    """
    found = batch.embed(partial(at_horizons, feature_map), horizons=HORIZONS, **options)
    for g, pair in zip(HORIZONS, found, strict=True):
        for got, want in zip(pair, anew(feature_map, batch, g, **options), strict=True):
            assert got.shape == want.shape
            torch.testing.assert_close(got, want, rtol=0, atol=atol)
    first, last = found[0][0], found[-1][0]
    if first.shape == last.shape:
        assert (first - last).abs().max() > 1e-2


@pytest.fixture(scope="module")
def backbone():
    return CausalPolicy(tiny().double())


@pytest.fixture
def batch():
    """Rollouts of 1 to 5 tokens and one without any, and a target that ends early."""
    made = make_batch()
    made.rollout_mask[0, 0, 3] = False
    made.target_mask[0, 1, 3:] = False
    assert set(made.rollout_mask.sum(-1).flatten().tolist()) == {0, 1, 2, 3, 4, 5}
    return made


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("how", pooling.NAMES)
def test_hidden_states(backbone, batch, how, documents):
    ids = (torch.arange(20) >= 6).long().repeat(3, 1) if documents else None
    for normalization in ("layer", "joint"):
        chosen = hidden(backbone, layers=(1, 3), pooling=how, normalization=normalization)
        check(chosen, batch, document_ids=ids)
    check(hidden(backbone, layers="mean", pooling=how), batch, document_ids=ids)


@pytest.mark.parametrize("name", ["mistral-window", "qwen3_moe", "bloom", "lfm2", "mamba"])
def test_hidden_states_of_other_architectures(batch, name):
    """Windows, experts (which know no float64), ALiBi, convolutions and recurrent states."""
    model, atol = (tiny(name), 5e-6) if name == "qwen3_moe" else (tiny(name).double(), 3e-7)
    check(hidden(CausalPolicy(model), layers=(1, 2)), batch, atol=atol)


MAPS = {
    "ngram": ngram,
    "match": match,
    "match_tokens": lambda: match("position", pooling="none"),
    "sbert": lambda: sbert(LetterEncoder(), Letters(), context_tokens=2),
}


@pytest.mark.parametrize("name", MAPS)
def test_maps_without_a_pass_for_all_embed_anew(batch, name):
    check(MAPS[name](), batch, atol=0)


@pytest.mark.parametrize("name", MAPS)
def test_joins(backbone, batch, name):
    how = "none" if name == "match_tokens" else "mean"
    check(join([hidden(backbone, layers=(2,), pooling=how), MAPS[name]()], [1.0, 0.5]), batch)


def test_a_copy_of_the_target_has_its_features_to_the_last_bit_at_every_horizon(batch):
    chosen = hidden(CausalPolicy(tiny(), kernel="chunked"))
    batch.rollout_tokens[0, 0, 1, 3] += 1  # a copy of three tokens
    found = batch.embed(partial(at_horizons, chosen), horizons=HORIZONS)
    for rollout, target in found[:3]:
        assert torch.equal(rollout[:, :, 1], target)
    rollout, target = found[3]
    assert torch.equal(rollout[1:, :, 1], target[1:])
    assert not torch.equal(rollout[0, 0, 1], target[0, 0])


@pytest.mark.parametrize("horizons", [(0, 2), (2, 6)])
def test_horizons_that_are_not_there_are_refused(batch, horizons):
    with pytest.raises(UsageError, match=rf"horizons=\[{horizons[0]}, {horizons[1]}\]: expected 1 to 5"):
        batch.embed(partial(at_horizons, ngram()), horizons=horizons)


# ---- in the measurements


@pytest.fixture
def passes(monkeypatch):
    """The tokens in a rollout, of every pass of a backbone."""
    made, plain = [], CausalPolicy.hidden_states

    def counted(self, tokens, mask, anchors_, anchor_mask, rollout_tokens, *rest, **options):
        made.append(rollout_tokens.shape[-1])
        return plain(self, tokens, mask, anchors_, anchor_mask, rollout_tokens, *rest, **options)

    monkeypatch.setattr(CausalPolicy, "hidden_states", counted)
    return made


@pytest.mark.parametrize("features", ["hidden", "join:hidden+ngram"])
def test_a_profile_costs_one_pass_for_a_batch(options, passes, features):
    policy, pipeline, rows = parts(options, features=features, horizon=6)
    offered = [part for part, _ in evaluate(policy, pipeline, rows, batch_size=4, seed=0, profile=True)]
    assert passes == [6, 6]
    pipeline["embed"] = partial(type(pipeline["embed"]).__call__, pipeline["embed"])  # a stage that only embeds
    again = [part for part, _ in evaluate(policy, pipeline, rows, batch_size=4, seed=0, profile=True)]
    assert passes[2:] == [1, 2, 4, 6, 1, 2, 4, 6]
    for one, other in zip(offered, again, strict=True):
        assert list(one["profile"]) == ["1", "2", "4", "6"]
        for g, pair in one["profile"].items():  # sums over 6 or so anchors of losses of about 1
            torch.testing.assert_close(pair, other["profile"][g], rtol=0, atol=1e-5)
        assert one["reward"][0].tolist() == pytest.approx(other["reward"][0].tolist(), abs=1e-5)


def test_an_evaluation_costs_one_pass_for_a_batch_and_map(tiny_folder, tiny_text, passes):
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32")
    rows = pack(load_documents(str(tiny_text)), policy.tokenizer, length=32)[:4]
    place = partial(anchors.strided, stride=7, first=5, horizon=8)
    stage = sampler(place, policy.sample, horizon=8, rollouts=3, eos=policy.tokenizer.eos_token_id)
    maps = {"last": hidden(policy), "mean": hidden(policy, pooling="mean"), "ngram": ngram()}
    list(measure_rollouts(policy, stage, maps, rows, horizons=(1, 2, 4, 8), batch_size=2, seed=0))
    assert passes == [8] * 4


def test_a_module_gives_the_features_of_the_map(batch):
    td_like = {name: getattr(batch, name) for name in ("tokens", "mask", "anchors", "anchor_mask")}
    td_like |= {(part, kind): getattr(batch, f"{part}_{kind}") for part in ("rollout", "target") for kind in
                ("tokens", "mask")}  # fmt: skip
    module = as_module(ngram())
    for g, got in zip(HORIZONS, module.at_horizons(td_like, HORIZONS), strict=True):
        for mine, want in zip(got, anew(ngram(), batch, g), strict=True):
            assert torch.equal(mine, want)
