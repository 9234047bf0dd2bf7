"""What is measured on rollouts and answers, against the ordinary loss, transformers' own and counting by hand."""

from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM

from ebft import sandbox, schema
from ebft.data import load_documents, pack
from ebft.data.examples import Example
from ebft.errors import UsageError
from ebft.features.hidden import hidden
from ebft.features.ngram import ngram
from ebft.loops.evaluate import evaluate
from ebft.loops.evaluation import quantities as names
from ebft.loops.evaluation.prompts import COMPILES, EXACT, PASS, PROGRAMS, answer_totals, measure_answers
from ebft.loops.evaluation.quantities import Quantity, concatenate, derived
from ebft.loops.evaluation.result import csv_bytes, look_up, paired_differences, read_totals, summarise
from ebft.loops.evaluation.rollouts import measure_rollouts, repeated
from ebft.loops.stages import at_step
from ebft.policy import CausalPolicy
from ebft.samplers import anchors
from ebft.samplers.component import sampler
from tests.runs import parts

HORIZON = 8


@pytest.fixture(scope="module")
def policy(tiny_folder):
    return CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def rows(policy, tiny_text):
    return pack(load_documents(str(tiny_text)), policy.tokenizer, length=32)[:5]


@pytest.fixture(scope="module")
def maps(policy):
    return {"hidden": hidden(policy.reference(), layers="last"), "ngram": ngram(2, dimension=64)}


def stage(policy, *, horizon=HORIZON, longest=HORIZON):
    """Rollouts of `horizon` tokens from the anchors at which `longest` would fit."""
    place = partial(anchors.strided, stride=7, first=5, horizon=longest)
    eos = policy.tokenizer.eos_token_id
    return sampler(place, policy.sample, horizon=horizon, rollouts=3, eos=eos)


def measured(policy, rows, maps, *, batch_size=5, horizons=(1, 3, HORIZON), **options):
    found = measure_rollouts(
        policy, stage(policy), maps, rows, horizons=horizons, batch_size=batch_size, seed=2, **options
    )
    return concatenate(list(found))


@pytest.fixture(scope="module")
def totals(policy, rows, maps):
    return measured(policy, rows, maps)


def assert_same(first, second, *, atol=2e-5):
    assert list(first) == list(second)
    for quantity in first:
        for a, b in zip(first[quantity], second[quantity], strict=True):
            torch.testing.assert_close(a, b, atol=atol, rtol=1e-5, msg=lambda m, q=quantity: f"{q}: {m}")


def test_profile_at_the_trained_horizon_is_the_ordinary_loss(options):
    """With the run's own anchors, seed and features: the loss that `run` reports, sequence by sequence."""
    policy, pipeline, rows = parts(options, horizon=HORIZON, stride=7)
    ordinary = [sums for sums, _ in evaluate(policy, pipeline, rows, batch_size=4, seed=2)]
    sums = torch.cat([part["feature_matching_loss"][0] for part in ordinary])
    assert sums.abs().max() > 1e-3
    ours = measured(policy, rows, {"hidden": hidden(policy.reference())}, batch_size=4)
    torch.testing.assert_close(ours[Quantity(names.MATCHING, "hidden", HORIZON)][0], sums, atol=1e-5, rtol=0)
    entropy = torch.cat([part["cross_entropy"][0] for part in ordinary])
    torch.testing.assert_close(ours[Quantity(names.CROSS_ENTROPY, names.ALL)][0], entropy, atol=1e-4, rtol=0)


@pytest.mark.parametrize("horizon", [1, 3])
def test_prefixes_are_what_a_shorter_sampling_draws(policy, rows, maps, totals, horizon):
    """One sampling of the longest horizon gives every shorter one: features of prefixes against sampling anew."""
    own = measure_rollouts(policy, stage(policy, horizon=horizon), maps, rows, horizons=[horizon], batch_size=5, seed=2)
    own = concatenate(list(own))
    for quantity in own:
        if quantity.at == horizon:
            for a, b in zip(own[quantity], totals[quantity], strict=True):
                torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5, msg=lambda m, q=quantity: f"{q}: {m}")


def test_cross_entropy_is_transformers_own(policy, rows, tiny_folder, maps):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager").float()
    one = rows.clone()
    one[schema.DOCUMENT_IDS] = torch.zeros_like(one[schema.DOCUMENT_IDS])
    labels = one[schema.TOKENS].masked_fill(~one[schema.MASK], -100)
    with torch.no_grad():
        theirs = model(input_ids=one[schema.TOKENS], attention_mask=one[schema.MASK].long(), labels=labels).loss
    ours = derived(*({q: p[i].sum() for q, p in measured(policy, one, maps).items()} for i in (0, 1)))
    assert ours[Quantity(names.CROSS_ENTROPY, names.ALL)].item() == pytest.approx(theirs.item(), abs=2e-6)
    assert ours[Quantity(names.PERPLEXITY, names.ALL)].item() == pytest.approx(theirs.exp().item(), rel=2e-6)


def test_answers_are_measured_apart(policy, rows, maps, totals):
    answer = torch.zeros_like(rows[schema.MASK])
    answer[:, 10:20] = True
    data = rows.clone().set(schema.ANSWER_MASK, answer)
    sums, counts = measured(policy, data, maps)[Quantity(names.CROSS_ENTROPY, names.ANSWERS)]
    assert Quantity(names.CROSS_ENTROPY, names.ANSWERS) not in totals
    td = stage(policy)(at_step(data.clone(), seed=2, step=-1))
    inputs = (schema.TOKENS, schema.MASK, schema.ANCHORS, schema.ANCHOR_MASK, schema.ROLLOUT_TOKENS)
    _, log_prob = policy.score(*(td[k] for k in inputs), td[schema.ROLLOUT_MASK], document_ids=data["document_ids"])
    same = data["document_ids"][:, 10:20] == data["document_ids"][:, 9:19]
    torch.testing.assert_close(counts, same.sum(1).double())
    torch.testing.assert_close(sums.float(), -(log_prob[:, 9:19] * same).sum(1).detach(), atol=1e-4, rtol=0)


def test_entropy_is_that_of_plain_forwards(policy, rows, totals):
    """On generated text and on data, place by place, with a forward pass of the whole text for each rollout."""
    td = stage(policy)(at_step(rows.clone(), seed=2, step=-1))
    want = {kind: torch.zeros(len(rows), HORIZON) for kind in (names.GENERATED, names.DATA, names.SURPRISAL)}
    for b, k in td[schema.ANCHOR_MASK].nonzero().tolist():
        a = int(td[schema.ANCHORS][b, k])
        own = rows[schema.DOCUMENT_IDS][b]
        start = int((own[:a] != own[a - 1]).nonzero()[-1]) + 1 if (own[:a] != own[a - 1]).any() else 0
        context = rows[schema.TOKENS][b, start:a]
        target = td[schema.TARGET_TOKENS][b, k]
        for kind, ends, masks in (
            (names.DATA, target[None], td[schema.TARGET_MASK][b, k][None]),
            (names.GENERATED, td[schema.ROLLOUT_TOKENS][b, k], td[schema.ROLLOUT_MASK][b, k]),
        ):
            for end, mask in zip(ends, masks, strict=True):
                with torch.no_grad(), policy.plain() as model:
                    logits = model(input_ids=torch.cat([context, end])[None]).logits[0, len(context) - 1 : -1]
                log_probs = logits.log_softmax(-1)
                want[kind][b] += -(log_probs.exp() * log_probs).sum(-1) * mask
                if kind == names.DATA:
                    want[names.SURPRISAL][b] -= log_probs.gather(-1, end[:, None])[:, 0]
    for place in range(HORIZON):
        for metric, of, kind in (
            (names.ENTROPY, names.GENERATED, names.GENERATED),
            (names.ENTROPY, names.DATA, names.DATA),
            (names.SURPRISAL, names.DATA, names.SURPRISAL),
        ):
            found = totals[Quantity(metric, of, place + 1)][0].float()
            torch.testing.assert_close(found, want[kind][:, place], atol=2e-4, rtol=1e-5)


def test_drift_is_the_slope_through_the_first_place(totals):
    values = derived(*({q: p[i].sum() for q, p in totals.items()} for i in (0, 1)))
    gaps = torch.stack([values[Quantity(names.GAP, at=k)] for k in range(1, HORIZON + 1)])
    assert gaps[0].abs() < 1e-6
    places = torch.arange(HORIZON, dtype=torch.float64)[:, None]
    slope = torch.linalg.lstsq(places, gaps[:, None]).solution.item()
    assert values[Quantity(names.DRIFT)].item() == pytest.approx(slope, abs=1e-12)
    entropies = [q for q in totals if q.metric == names.ENTROPY]
    straight = {q: torch.tensor(0.25 * (q.at - 1) * (q.of == names.GENERATED)) for q in entropies}
    values = derived(straight, dict.fromkeys(straight, torch.ones(())))
    assert values[Quantity(names.DRIFT)].item() == pytest.approx(0.25)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_independent_of_the_batch_size(policy, rows, maps, totals, batch_size):
    assert_same(measured(policy, rows, maps, batch_size=batch_size), totals)


def test_deterministic(policy, rows, maps, totals):
    again = measured(policy, rows, maps)
    assert csv_bytes(again) == csv_bytes(totals)
    assert summarise(again, replicates=50) == summarise(totals, replicates=50)


def test_repeated_and_copies():
    tokens = torch.tensor([[1, 2], [1, 2], [3, 4], [1, 9]])
    mask = torch.ones_like(tokens, dtype=torch.bool)
    assert repeated(tokens, mask).item() == 0.5
    mask[3, 1] = mask[0, 1] = False
    assert repeated(tokens, mask).item() == 0.5  # now the first and the last are the one token 1
    assert repeated(tokens[1:], mask[1:]).item() == 0.0


def test_reward_is_the_difference_of_its_parts_and_the_loss_follows(totals):
    """L = ‖φ(y)‖² - AT + DT/2; ngram features have unit norm."""
    for name in ("hidden", "ngram"):
        one = {
            m: totals[Quantity(m, name, 3)][0]
            for m in (names.MATCHING, names.REWARD, names.ALIGNMENT, names.SIMILARITY)
        }
        torch.testing.assert_close(one[names.REWARD], one[names.ALIGNMENT] - one[names.SIMILARITY])
    anchors_of = totals[Quantity(names.MATCHING, "ngram", 3)][1]
    torch.testing.assert_close(
        one[names.MATCHING], anchors_of - one[names.ALIGNMENT] + one[names.SIMILARITY] / 2, atol=1e-5, rtol=0
    )


def test_paired_differences_are_those_of_the_values_and_narrower(policy, rows, maps, totals, tiny_folder):
    other = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32")
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter.mul_(1.02)
    changed = measured(other, rows, maps)
    values = [summarise(t, replicates=200) for t in (totals, changed)]
    entries = paired_differences(totals, changed, replicates=200)
    for entry, first, second in zip(entries, *values, strict=True):
        assert entry["value"] == pytest.approx(second["value"] - first["value"], abs=1e-9)
    ce = [look_up(found, names.CROSS_ENTROPY, names.ALL)["standard_error"] for found in (entries, *values)]
    assert ce[0] < 0.5 * (ce[1] ** 2 + ce[2] ** 2) ** 0.5
    with pytest.raises(UsageError, match="same units"):
        paired_differences(totals, {q: (s[:2], c[:2]) for q, (s, c) in totals.items()})


def test_csv_gives_the_totals_back(totals, tmp_path):
    (tmp_path / "v.csv").write_bytes(csv_bytes(totals))
    assert_same(read_totals(tmp_path / "v.csv"), totals, atol=0)
    (tmp_path / "v.csv").write_text("step,loss\n1,2\n")
    with pytest.raises(UsageError, match="does not hold the values of an evaluation"):
        read_totals(tmp_path / "v.csv")


# ---- whole answers


def test_answers_are_tested_compiled_and_compared():
    problems = [
        Example("a", "def double(x):\n", "    return 2 * x\n", ("assert double(3) == 6",)),
        Example("b", "Say hi", "hi"),
    ]
    texts = [
        ["    return 2 * x\n", "    return x\n", "    return (\n", "    return x + x\n"],
        ["hi", "ho", " hi", "hi"],
    ]
    found = answer_totals(texts, problems, ks=[1, 2])
    assert found[Quantity(PASS, at=1)][0].tolist() == [0.5, 0.0]
    assert found[Quantity(PASS, at=1)][1].tolist() == [1.0, 0.0]
    assert found[Quantity(PASS, at=2)][0][0].item() == pytest.approx(1 - 1 / 6)
    assert found[Quantity(COMPILES)][0][0].item() == 0.75
    ends = {reason: found[Quantity(PROGRAMS.format(reason))] for reason in sandbox.REASONS}
    counted = {reason: values.tolist() for reason, (values, _) in ends.items() if values.any()}
    assert counted == {"passed": [0.5, 0.0], "failed": [0.25, 0.0], "error": [0.25, 0.0]}
    assert all(count.tolist() == [1.0, 0.0] for _, count in ends.values())
    for together in (True, False):  # asked for, whatever the prompts are
        told = answer_totals(texts, problems, ks=[1, 2], test_prompt=together)
        assert torch.equal(told[Quantity(PASS, at=1)][0], found[Quantity(PASS, at=1)][0] * together)
    assert found[Quantity(EXACT, at=1)][0].tolist() == [0.25, 0.75]
    assert found[Quantity("distinct_answers")][0].tolist() == [1.0, 0.75]
    entries = summarise(found, replicates=50)
    assert look_up(entries, PASS, at=1)["value"] == 0.5
    assert look_up(entries, PASS, at=1)["units"] == 1
    assert 0 < look_up(entries, names.BLEU)["value"] < 1


def test_answers_do_not_depend_on_the_batch_size(policy):
    prompts = ["def add(", "for index", "print(in", "left + "]
    ids = [policy.tokenizer(p)["input_ids"] for p in prompts]
    width = max(map(len, ids))
    data = pack(load_documents(__file__), policy.tokenizer, length=width)[: len(ids)].select(
        schema.TOKENS, schema.MASK, schema.SEQUENCE_IDS
    )
    for row, own in zip(data, ids, strict=True):
        row[schema.TOKENS][: len(own)] = torch.tensor(own)
        row[schema.MASK][:] = torch.arange(width) < len(own)
    problems = [Example(prompt, prompt, "x") for prompt in prompts]

    def go(batch_size):
        from ebft.assemble.reward import decoder

        found = measure_answers(
            policy.sample, decoder(policy.tokenizer), data, problems, samples=3, max_new_tokens=6, ks=[1, 3],
            batch_size=batch_size, seed=1, eos=policy.tokenizer.eos_token_id, device=policy.device, temperature=0.8,
        )  # fmt: skip
        totals, texts = zip(*found, strict=True)
        return concatenate(totals), [group for part in texts for group in part]

    whole, texts = go(4)
    assert len(texts) == 4
    assert len({text for group in texts for text in group}) > 4
    for size in (1, 3):
        again, same = go(size)
        assert same == texts
        assert_same(again, whole)
