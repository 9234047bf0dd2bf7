"""Rewards of `run` other than feature matching: verifiers, energies and combinations, on a tiny model."""

import dataclasses
import json

import pytest
import torch

from ebft import schema
from ebft.assemble import build_reward, settle
from ebft.assemble.reward import decoder
from ebft.components import OPTION_NAMES, resolve_options
from ebft.errors import UsageError
from ebft.loops.stages import at_step
from ebft.objectives.energy import LinearEnergy
from ebft.objectives.energy_reward import energy_reward, load_energy, save_energy
from ebft.objectives.verifiers import chrf, reward_advantage
from tests.runs import go, metrics, parts


@dataclasses.dataclass(frozen=True)
class Example:
    prompt: str
    answer: str
    tests: tuple[str, ...]


def rewarded(options, **changes):
    """A batch of two sequences after all stages, and the policy."""
    policy, pipeline, rows = parts(options, **changes)
    td = at_step(rows[:2].clone(), seed=0, step=0)
    for stage in pipeline.values():
        td = stage(td)
    return policy, td


def texts(policy, td, b, k):
    decode = decoder(policy.tokenizer)
    rollouts = decode(td[schema.ROLLOUT_TOKENS][b, k], td[schema.ROLLOUT_MASK][b, k])
    return rollouts, decode(td[schema.TARGET_TOKENS][b, k][None], td[schema.TARGET_MASK][b, k][None])[0]


def test_a_verifier_compares_with_the_text_that_follows(options):
    policy, td = rewarded(options, objective="verifier", word_order=2, estimator="rloo")
    b, k = td[schema.ANCHOR_MASK].nonzero()[1].tolist()
    rollouts, target = texts(policy, td, b, k)
    wanted = chrf(rollouts, [target] * len(rollouts), word_order=2)
    torch.testing.assert_close(td[schema.REWARD][b, k], wanted)
    assert wanted.std() > 0
    torch.testing.assert_close(td[schema.ADVANTAGE][b, k], reward_advantage(wanted))


def test_a_function_of_ones_own_sees_a_group(options, tmp_path):
    own = tmp_path / "own.py"
    own.write_text(
        "def longest(texts, reference):\n    return [float(len(t) == max(map(len, texts))) for t in texts]\n"
    )
    chosen = {"objective": "verifier", "verifier": f"{own}:longest", "group_aware": True, "estimator": "none"}
    policy, td = rewarded(options, **chosen)
    b, k = td[schema.ANCHOR_MASK].nonzero()[0].tolist()
    lengths = [len(text) for text in texts(policy, td, b, k)[0]]
    assert td[schema.REWARD][b, k].tolist() == [float(n == max(lengths)) for n in lengths]


def test_a_combination_is_the_sum_of_its_parts_each_logged(options, tmp_path):
    alone = {name: rewarded(options, objective=name)[1] for name in ("feature_matching", "verifier")}
    chosen = {"objective": "combine:feature_matching+-0.5*verifier"}
    _, both = rewarded(options, **chosen)
    for key in (schema.REWARD, schema.ADVANTAGE):
        wanted = alone["feature_matching"][key] - 0.5 * alone["verifier"][key]
        torch.testing.assert_close(both[key], wanted)
    go(options | chosen | {"steps": 2, "kl": 0.0}, tmp_path / "run")
    for row in metrics(tmp_path / "run"):
        total = float(row["feature_matching_reward"]) - 0.5 * float(row["verifier_reward"])
        assert float(row["reward"]) == pytest.approx(total, abs=1e-6)
        assert {"feature_matching_alignment", "verifier_reward_spread", "zero_advantage_groups"} <= row.keys()


def test_two_ways_of_matching_are_whitened_each_and_shaped_together(options, tmp_path):
    chosen = {"objective": "combine:feature_matching+2*kernel_score", "whitening": "population", "decay": 0.9,
              "clip_advantage": 0.01, "drop_zero_spread": True, "normalize_advantage": True, "kl": 0.0}  # fmt: skip
    go(options | chosen | {"steps": 2}, tmp_path / "run")
    assert len(metrics(tmp_path / "run")) == 2
    _, td = rewarded(options | chosen | {"whitening": "none", "decay": None})
    assert td[schema.ADVANTAGE].abs().max() == pytest.approx(0.01)


def test_a_group_without_spread_is_dropped_when_no_part_has_any(options):
    """Rewards that a verifier gives to all rollouts alike leave the other part's spread, and its groups, alone."""
    _, same = rewarded(options, objective="verifier", verifier="exact_match")
    flags = same["metrics", "zero_spread_groups"] > 0
    assert flags[same[schema.ANCHOR_MASK]].any()
    _, td = rewarded(options, objective="combine:verifier+feature_matching", verifier="exact_match",
                     drop_zero_spread=True)  # fmt: skip
    assert not td["metrics", "zero_spread_groups"].any()
    assert td[schema.ADVANTAGE][flags].abs().amax(-1).gt(0).all()


def test_examples_give_answers_and_tests(options):
    _, td = rewarded(options)
    rows = td[schema.SEQUENCE_IDS].tolist()
    examples = {
        rows[0]: Example("x = 1\n", "any", ("assert x == 1",)),
        rows[1]: Example("x = 2\n", "any", ("assert x == 1", "assert x == 2")),
    }
    own = {"verifier": "unit_tests", "test_prompt": True, "test_credit": "share"}
    chosen = settle(options | {"objective": "verifier", **own})
    resolved = resolve_options({"objective": "verifier"}, {n: chosen[n] for n in OPTION_NAMES if n in WANTED})

    def decode(tokens, mask):
        return ["pass\n"] * len(tokens)

    out = build_reward(chosen, resolved, decode=decode, examples=examples.__getitem__)(td.clone())
    real = td[schema.ANCHOR_MASK]
    assert out[schema.REWARD][0][real[0]].unique().tolist() == [1.0]
    assert out[schema.REWARD][1][real[1]].unique().tolist() == [0.5]
    answers = {row: Example("", "pass", ()) for row in rows}
    chosen = settle(options | {"objective": "verifier", "verifier": "exact_match"})
    resolved = resolve_options({"objective": "verifier"}, {n: chosen[n] for n in OPTION_NAMES if n in WANTED})
    out = build_reward(chosen, resolved, decode=decode, examples=answers.__getitem__)(td.clone())
    assert out[schema.REWARD][real].unique().tolist() == [1.0]


WANTED = {"verifier", "test_prompt", "test_credit"}
FEATURES = {"features": "ngram", "ngram": 2, "dimension": 64}


def test_an_energy_is_a_reward(options, tmp_path):
    chi = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    save_energy(tmp_path / "energy.safetensors", LinearEnergy(chi), {"features": FEATURES})
    energy, about = load_energy(tmp_path / "energy.safetensors")
    assert torch.equal(energy.chi, chi)
    assert about == {"features": FEATURES}
    chosen = {"objective": "energy", "energy": str(tmp_path / "energy.safetensors"), "features": "ngram",
              "estimator": "rloo"}  # fmt: skip
    _, td = rewarded(options, **chosen, dimension=64)
    wanted = -(td[schema.ROLLOUT_FEATURES] @ chi.float())
    real = td[schema.ANCHOR_MASK]
    torch.testing.assert_close(td[schema.REWARD][real], wanted[real])
    assert (td[schema.REWARD][~real] == 0).all()
    torch.testing.assert_close(td[schema.ADVANTAGE][real], reward_advantage(wanted[real]))
    with pytest.raises(UsageError, match="dimension 64, and this run has dimension 32"):
        rewarded(options, **chosen, dimension=32)
    with pytest.raises(UsageError, match=r"chi has shape \[2, 64\]"):
        energy_reward(LinearEnergy(torch.zeros(2, 64)))


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"objective": "combine:feature_matching+verifer"}, "did you mean 'verifier'"),
        ({"objective": "combine:verifier+verifier"}, "verifier is there twice"),
        ({"objective": "combine:much*verifier"}, "found 'much'"),
        ({"objective": "combine:nan*verifier"}, "weight nan of verifier"),
        ({"verifier": "chrf"}, "--verifier chrf does not apply"),
        ({"objective": "verifier", "verifier": "chrff"}, "did you mean 'chrf'"),
        ({"objective": "verifier", "verifier": "nowhere.py:f"}, "there is no file 'nowhere.py'"),
        ({"objective": "verifier", "verifier": "bleu", "word_order": 2}, "--word-order 2 does not apply to --verifier"),
        ({"objective": "verifier", "group_aware": True}, "--group-aware: chrf looks at one text"),
        ({"objective": "verifier", "verifier": "unit_tests"}, "wants examples with tests"),
        ({"objective": "verifier", "verifier": "unit_tests", "test_credit": "some"}, "--test-credit 'some'"),
        ({"objective": "verifier", "whitening": "group"}, "--whitening group"),
        ({"objective": "verifier", "diversity": 0.5}, "--diversity 0.5"),
        ({"objective": "verifier", "pooling": "none", "credit": "total"}, "--credit total"),
        ({"objective": "verifier", "clip_advantage": -1.0}, "clip_advantage=-1.0"),
        ({"objective": "energy"}, "--energy FILE"),
        ({"objective": "energy", "energy": "no.safetensors"}, "no such file"),
    ],
    ids=str,
)
def test_mistakes_are_told_before_anything_is_written(options, tmp_path, chosen, message):
    with pytest.raises(UsageError) as caught:
        go(options | chosen, tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", [b"", b"{}", None], ids=str)
def test_a_file_that_is_no_energy_is_refused(tmp_path, content):
    path = tmp_path / "energy.safetensors"
    if content is None:
        from safetensors.torch import save_file

        save_file({"other": torch.zeros(2)}, path, metadata={"about": json.dumps({})})
    else:
        path.write_bytes(content)
    with pytest.raises(UsageError, match="holds no energy"):
        load_energy(path)
