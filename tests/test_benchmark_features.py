"""The benchmark of feature maps: its gradients and statistics against plain ones, and that it keeps what it has."""

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from benchmarks import feature_cost, features, features_report, score_gradients
from benchmarks.contestants import Choice, Setting
from benchmarks.feature_rollouts import Draw, draw_rollouts
from benchmarks.feature_signal import jackknife, measure, signal_to_noise, won
from ebft import schema
from ebft.errors import UsageError
from ebft.objectives.baselines import advantage
from ebft.objectives.moments import feature_matching_reward, moment_values
from ebft.policy import CausalPolicy
from tests.models import tiny

DRAW = Draw(sequences=2, length=20, stride=6, first=4, horizon=3, rollouts=3, resamples=3, seed=0)


class LetterCounts:
    """A sentence encoder of letters, without a limit on the length."""

    def encode(self, texts, **options):
        rows = [[1.0 + text.count(chr(c)) for c in range(97, 123)] for text in texts]
        return torch.tensor(rows)


# ---- gradients


def test_gradients_are_those_of_adapters_switched_on_where_a_rollout_starts():
    """Each rollout by itself, the adapters' outputs before the last token of its prefix taken away."""
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    policy = CausalPolicy(get_peft_model(tiny(), config))
    random = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 29, (2, 12), generator=random)
    mask, anchors = torch.ones_like(tokens, dtype=torch.bool), torch.tensor([[2, 7], [3, 9]])
    rollouts = torch.randint(2, 29, (2, 2, 6, 3), generator=random)
    own = torch.arange(3) < torch.randint(1, 4, (2, 2, 6, 1), generator=random)
    gains = torch.randn(4, 2, 2, 6, generator=random)
    yes = torch.ones(2, 2, dtype=torch.bool)
    found = score_gradients.score_gradients(policy, tokens, mask, anchors, yes, rollouts, own, advantages=gains, sets=2)

    parameters = [p for name, p in policy.model.named_parameters() if "lora_B" in name]
    wanted = torch.zeros(4, 2, sum(p.numel() for p in parameters))
    for b, k, j in torch.cartesian_prod(torch.arange(2), torch.arange(2), torch.arange(6)).tolist():
        anchor, drawn = int(anchors[b, k]), rollouts[b, k, j][own[b, k, j]]
        row = torch.cat([tokens[b, :anchor], drawn])
        late = (torch.arange(len(row)) >= anchor - 1).float()[None, :, None]
        handles = [
            module.default.register_forward_hook(lambda module, args, out, late=late: out * late)
            for name, module in policy.model.named_modules()
            if name.endswith("lora_B")
        ]
        with policy.plain() as model:
            log_probs = model(input_ids=row[None]).logits[0, anchor - 1 : -1].log_softmax(-1)
        score = log_probs.gather(-1, drawn[:, None]).sum()
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(score, parameters)])
        for handle in handles:
            handle.remove()
        wanted[:, j // 3] += gains[:, b, k, j, None] * gradient
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert wanted.abs().max() > 0.1
    with pytest.raises(UsageError, match="2 tokens or more"):
        score_gradients.score_gradients(policy, tokens, mask, anchors - 1, yes, rollouts, own, advantages=gains, sets=2)
    with pytest.raises(UsageError, match="LoRA"):
        score_gradients.score_gradients(
            CausalPolicy(tiny()), tokens, mask, anchors, yes, rollouts, own, advantages=gains, sets=2
        )


def test_signal_to_noise_is_unbiased_for_its_two_parts():
    """Gradients of a mean of norm 2 and unit noise in 200 dimensions: 4 over 200; the jackknife is up to √2 wide."""
    random = torch.Generator().manual_seed(0)
    mean = torch.zeros(200)
    mean[0] = 2.0
    draws = mean + torch.randn(300, 8, 200, generator=random)
    found = torch.tensor([signal_to_noise(g @ g.mT) for g in draws])
    assert found[:, 0].mean() == pytest.approx(4 / 200, abs=4 * float(found[:, 0].std()) / 300**0.5)
    assert 0.9 < found[:, 1].mean() / found[:, 0].std() < 1.1 * 2**0.5
    exact = torch.ones(3, 5)
    exact[2] *= 2
    gram = exact @ exact.mT  # products 5, 10, 10, squares 5, 5, 20
    assert signal_to_noise(gram)[0] == pytest.approx((25 / 3) / (10 - 25 / 3))
    assert math.isnan(signal_to_noise(torch.zeros(3, 3))[0])


# ---- statistics


def test_the_planted_text_wins_when_it_is_the_most_alike():
    k = torch.tensor([[9.0, 3, 1], [3, 9, 2], [1, 2, 9]])  # means of the others 2, 2.5, 1.5
    assert won(k).item() == 0
    assert won(k[[1, 0, 2]][:, [1, 0, 2]]).item() == 1
    assert won(torch.eye(4)).item() == 0.25
    pair = torch.zeros(3, 3)
    pair[0, 1] = pair[1, 0] = 1
    assert won(pair).item() == 0.5


def test_rows_are_those_of_plain_loops():
    random = torch.Generator().manual_seed(0)
    rollout, target = torch.randn(4, 3, 6, 5, generator=random), torch.randn(4, 3, 5, generator=random)
    same = torch.rand(4, 3, 6, generator=random)
    row, gain = measure(rollout, target, same, whitening="none", group=3)
    rewards, agreements, wins = [], [], []
    for b, k, r in torch.cartesian_prod(torch.arange(4), torch.arange(3), torch.arange(2)).tolist():
        group = rollout[b, k, 3 * r : 3 * r + 3]
        reward = feature_matching_reward(group, target[b, k])
        expected = advantage(*moment_values(group, target[b, k]))
        torch.testing.assert_close(gain[b, k, 3 * r : 3 * r + 3], expected, rtol=1e-4, atol=1e-5)
        rewards.append(reward)
        agreements.append(same[b, k, 3 * r : 3 * r + 3])
        planted = torch.stack([target[b, k], group[0], group[1]])
        alike = [sum(float(planted[i] @ planted[j]) for j in range(3) if j != i) for i in range(3)]
        wins.append(float(alike[0] == max(alike)))
    r, a = (torch.stack(x) for x in (rewards, agreements))
    centred = torch.stack([(x - x.mean(-1, keepdim=True)).flatten() for x in (r, a)])
    assert row["agreement"][0] == pytest.approx(float(torch.corrcoef(centred)[0, 1]), abs=1e-5)
    assert row["planted"][0] == pytest.approx(sum(wins) / len(wins))
    assert row["spread"] == pytest.approx(float(r.std(-1).mean()), rel=1e-5)
    assert row["flat"] == 0.0


def test_a_population_moment_is_of_the_other_half_of_the_sequences():
    random = torch.Generator().manual_seed(0)
    rollout, target = torch.randn(4, 3, 6, 5, generator=random), torch.randn(4, 3, 5, generator=random)
    same = torch.rand(4, 3, 6, generator=random)
    _, gain = measure(rollout, target, same, whitening="population", group=3)
    changed = rollout.clone()
    changed[0] *= 3  # sequence 2 is of its half, 1 and 3 are whitened by it
    _, other = measure(changed, target, same, whitening="population", group=3)
    assert torch.equal(gain[2], other[2])
    assert (gain[1] - other[1]).abs().max() > 1e-2


def test_jackknife_is_the_standard_error_of_a_mean():
    values = torch.tensor([1.0, 4.0, 2.0, 7.0], dtype=torch.float64)
    sums = torch.stack([values, torch.ones(4, dtype=torch.float64)], -1)
    mean, error = jackknife(sums, lambda total: float(total[0] / total[1]))
    assert mean == 3.5
    assert error == pytest.approx(float(values.std()) / 2)


# ---- costs


def test_full_passes_and_the_comb_give_the_same_features():
    policy = CausalPolicy(tiny(num_hidden_layers=4))
    policy.causal_lm.set_attn_implementation("sdpa")
    policy = CausalPolicy(policy.causal_lm)
    setting = Setting(26, horizon=4, rollouts=3)
    ours, theirs = (way(policy, setting)() for way in (feature_cost.comb, feature_cost.full_forwards))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_rollouts_are_real_and_of_one_document(tiny_folder):
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32")
    drawn = draw_rollouts(policy, "prose", DRAW)
    assert drawn[schema.ROLLOUT_TOKENS].shape == (2, 3, 9, 3)
    assert drawn[schema.ANCHORS].tolist() == [[4, 10, 16]] * 2
    for b, k in ((0, 0), (1, 2)):
        anchor = int(drawn[schema.ANCHORS][b, k])
        assert torch.equal(drawn[schema.TARGET_TOKENS][b, k], drawn[schema.TOKENS][b, anchor : anchor + 3])
    with pytest.raises(UsageError, match="--sequences 2000: only"):
        draw_rollouts(policy, "prose", Draw(**{**DRAW.__dict__, "sequences": 2000}))


# ---- the whole


def test_benchmark_keeps_what_it_has_and_repeats_itself(tiny_folder, tmp_path):
    choice = Choice(str(tiny_folder), "float32", "cpu", 2)
    plan = features.Plan(
        stages=["hidden", "sbert", "signal"],
        sources=["prose"],
        maps=["hidden-0.5", "random", "sbert-16", "ngram-1", "hidden+ngram-1"],
        whitenings=["none", "group", "sample", "population"],
        settings=[Setting(24, 4, 2)],
        repeats=1,
        encoder=LetterCounts(),
        cache=tmp_path,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "in_fresh_process", lambda function, *args: 2**20)
        patch.setattr(LetterCounts, "__repr__", lambda self: "letters")
        said: list[str] = []
        first = features.benchmark(choice, DRAW, plan, earlier={}, save=json.dumps, say=said.append)
        again = features.benchmark(choice, DRAW, plan, earlier=first, save=json.dumps, say=said.append)
        rows = [row for row in first["signal"] if row["features"] != "random"]
        for row in rows:
            row.pop("snr2")
        first["signal"] = rows
        said.clear()
        third = features.benchmark(choice, DRAW, plan, earlier=first, save=json.dumps, say=said.append)
    assert said[-2:] == ["prose: random", "prose: gradients of 20 rewards"]
    assert len(again["signal"]) == 5 * 4

    def by_name(results):
        return {(row["features"], row["whitening"]): row for row in results["signal"]}

    assert by_name(third).keys() == by_name(again).keys()
    for key, row in by_name(again).items():
        assert json.dumps(by_name(third)[key], sort_keys=True) == json.dumps(row, sort_keys=True)
        assert 0 <= row["planted"][0] <= 1
        assert row["snr2"][0] == row["snr2"][0] or row["flat"] == 1
    assert all(row["distinct"] <= row["strings"] == 2 * 3 * 4 for row in again["sbert"])
    features_report.write(tmp_path / "out", tmp_path / "docs" / "features.png", again)
    text = (tmp_path / "out" / "features.md").read_text()
    assert text.count("| hidden-0.5 |") == 4
    assert json.loads((tmp_path / "out" / "features.json").read_text())["draw"]["rollouts"] == 3
    assert (tmp_path / "docs" / "features.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": "hidden,sbert"}, "--maps sbert: expected some of hidden"),
        ({"stage": "signals"}, "--stage signals"),
        ({"rollouts": 2}, "--rollouts 2: expected a whole number >= 3"),
        ({"first": 1}, "--first 1"),
        ({"resamples": 2}, "--resamples 2"),
    ],
)
def test_wrong_options(options, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        features.main(out=tmp_path, cache=tmp_path, **options)


@pytest.mark.parametrize("quick", [False, True])
def test_a_trial_leaves_the_real_results_alone(quick, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(features, "benchmark", lambda *args, save, **options: save(args) or {})
    monkeypatch.setattr(features_report, "write", lambda *places: written.append(places[:2]))
    monkeypatch.setattr(features_report, "markdown", lambda results: "")
    features.main(cache=tmp_path, quick=quick)
    results, plot = tmp_path / "quick", tmp_path / "quick" / "features.png"
    real = features.ROOT / "benchmarks" / "results", features.ROOT / "docs" / "features.png"
    assert written == [(results, plot) if quick else real]
