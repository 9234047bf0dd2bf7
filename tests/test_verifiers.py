"""Scores of texts against sacrebleu and by hand, and the step that turns them into rewards and advantages."""

from __future__ import annotations

import math

import pytest
import sacrebleu
import torch
from tensordict import TensorDict
from torch import Tensor

from ebft import schema
from ebft.errors import UsageError
from ebft.objectives import verifiers
from ebft.objectives.verifiers import bleu, chrf, exact_match, reward_advantage, unit_tests, verifier

TEXTS = [
    "The cat sat on the mat.",
    "the cat is on a mat",
    "Ein Haus, ein Baum – und größer!",
    "",
    "x",
    "completely different words here",
]
REFERENCES = [
    ["The cat sat on the mat.", "A cat is sitting on the mat."],
    "The cat is on the mat.",
    "Ein Haus, ein Baum und grösser!",
    "Something",
    "x",
    "no overlap at all",
]


def several(references):
    return [[right] if isinstance(right, str) else right for right in references]


# ---- scores


@pytest.mark.parametrize(
    ("text", "reference", "expected"),
    [
        ("42", "42", 1.0),
        ("  4 \n 2 ", "4 2", 1.0),
        ("42", "4 2", 0.0),
        ("Yes", "yes", 0.0),
        ("Yes", ["no", "Yes"], 1.0),
        ("Yes", [], 0.0),
        ("", "", 1.0),
        ("", "a", 0.0),
        ("é", "e\u0301", 0.0),  # composed and decomposed: normalize says whether they are the same
    ],
)
def test_exact_match(text, reference, expected):
    assert exact_match([text], [reference]).tolist() == [expected]


def test_exact_match_normalizes_both_sides():
    found = exact_match(["YES ", "yes"], ["yes ", "YES "], normalize=str.lower)
    assert found.tolist() == [1.0, 0.0]
    assert found.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"tokenize": "intl"}, {"tokenize": "char", "lowercase": True}])
def test_bleu_is_sacrebleu(options):
    found = bleu(TEXTS, REFERENCES, **options)
    for value, text, right in zip(found.tolist(), TEXTS, several(REFERENCES), strict=True):
        sentence = sacrebleu.sentence_bleu(text, right, use_effective_order=True, **options).score / 100
        corpus = sacrebleu.corpus_bleu([text], [[one] for one in right], use_effective_order=True, **options).score
        assert value == pytest.approx(sentence, abs=1e-6)  # float32 holds the result
        assert value == pytest.approx(corpus / 100, abs=1e-6)
    assert found.min() >= 0
    assert found.max() == found[0] == 1


def test_bleu_by_hand():
    """All 1- and 2-grams of a text of two words are in the reference of three: the brevity penalty remains."""
    assert bleu(["the cat"], ["the cat sat"]).item() == pytest.approx(math.exp(1 - 3 / 2), abs=1e-6)


@pytest.mark.parametrize("options", [{}, {"word_order": 2}])
def test_chrf_is_sacrebleu(options):
    found = chrf(TEXTS, REFERENCES, **options)
    for value, text, right in zip(found.tolist(), TEXTS, several(REFERENCES), strict=True):
        assert value == pytest.approx(sacrebleu.sentence_chrf(text, right, **options).score / 100, abs=1e-6)
        corpus = sacrebleu.corpus_chrf([text], [[one] for one in right], **options).score / 100
        assert value == pytest.approx(corpus, abs=1e-6)
    assert found.min() >= 0
    assert found.max() == found[0] == 1


def test_chrf_by_hand():
    """ "ab" for "abc": precision 1, 1; recall 2/3, 1/2, averaged over the orders that both have; F with β = 2."""
    precision, recall = 1.0, (2 / 3 + 1 / 2) / 2
    expected = 5 * precision * recall / (4 * precision + recall)
    assert chrf(["ab"], ["abc"]).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("score", [bleu, chrf])
def test_lowercase(score):
    lower = score([text.lower() for text in TEXTS], [[one.lower() for one in right] for right in several(REFERENCES)])
    assert torch.equal(score(TEXTS, REFERENCES, lowercase=True), lower)
    assert not torch.equal(score(TEXTS, REFERENCES), lower)


def test_unit_tests_all_or_share():
    programs = [
        "def f(x): return x + 1",
        "def f(x): return x",
        "def f(x: return",
        "def f(x):\n while x: pass\n return 1",
    ]
    tests = [["assert f(0) == 1", "assert f(1) == 2", "assert f(0) == f(0)", "assert f(-1) == 0"]] * 4
    options = {"timeout": 1.5, "workers": 2}
    assert unit_tests(programs, tests, **options).tolist() == [1.0, 0.0, 0.0, 0.0]
    assert unit_tests(programs, tests, credit="share", **options).tolist() == [1.0, 0.25, 0.0, 0.5]


def test_unit_tests_runs_the_same_program_once(monkeypatch):
    runs = []

    def run_all(jobs, **options):
        runs.append((list(jobs), options))
        return [verifiers.sandbox.Result("passed" if "good" in program else "failed", "") for program, _ in jobs]

    monkeypatch.setattr(verifiers.sandbox, "run_all", run_all)
    tests = [["a", "b"], ["a", "b"], ["a", "b"], ["c"]]
    options = {"timeout": 2.0, "memory": 128, "workers": 3, "isolation": "limits"}
    assert unit_tests(["good", "bad", "good", "good"], tests, **options).tolist() == [1.0, 0.0, 1.0, 1.0]
    assert runs == [([("good", "a\nb"), ("bad", "a\nb"), ("good", "c")], options)]
    assert unit_tests([], []).tolist() == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact_match(["a"], ["a", "b"]), "1 texts but 2 references"),
        (lambda: exact_match("ab", ["a", "b"]), "texts is the one string 'ab'"),
        (lambda: chrf(["a", "b"], "ab"), "references is the one string 'ab'"),
        (lambda: bleu(["a"], ["a"], tokenize="flores200"), "tokenize='flores200'.*13a, intl, char, zh, none"),
        (lambda: chrf(["a"], ["a"], word_order=-1), "word_order=-1"),
        (lambda: unit_tests(["a"], [["b"]], credit="some"), "credit='some'.*'all' or 'share'"),
        (lambda: unit_tests(["a"], ["assert f()"]), r"tests\[0\]='assert f\(\)'.*list of at least one"),
        (lambda: unit_tests(["a"], [[]]), r"tests\[0\]=\[\]"),
        (lambda: unit_tests(["a"], [["b"]], timeout=-1), "timeout=-1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(UsageError, match=message):
        call()


# ---- as a step of a pipeline


def decode(tokens: Tensor, mask: Tensor) -> list[str]:
    """Token i is the i-th letter."""
    return ["".join(chr(97 + i) for i in row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]


def batch(*, seed: int = 0, shape: tuple[int, int, int, int] = (2, 3, 4, 5)) -> TensorDict:
    """Rollouts and targets of random letters and lengths; the last anchor of the second row is masked."""
    generator = torch.Generator().manual_seed(seed)
    b, k, n, g = shape

    def draw(*sizes: int) -> dict[str, Tensor]:
        length = torch.randint(0, g + 1, sizes, generator=generator)
        tokens = torch.randint(0, 3, (*sizes, g), generator=generator)
        return {"tokens": tokens, "mask": torch.arange(g) < length[..., None]}

    anchor_mask = torch.ones(b, k, dtype=torch.bool)
    anchor_mask[-1, -1] = False
    return TensorDict(
        {
            "rollout": TensorDict(draw(b, k, n), [b]),
            "target": TensorDict(draw(b, k), [b]),
            "anchor_mask": anchor_mask,
            "sequence_ids": torch.arange(b) + 10,
        },
        [b],
    )


def common(texts: list[str], references: list[str]) -> list[float]:
    """Letters at the same place."""
    return [float(sum(a == b for a, b in zip(*pair, strict=False))) for pair in zip(texts, references, strict=True)]


def test_rewards_are_those_of_the_texts_and_targets():
    td = batch()
    reward = verifier(common, decode=decode)(td)[schema.REWARD]
    assert reward.shape == (2, 3, 4)
    assert reward.std() > 0
    for b, k in td["anchor_mask"].nonzero().tolist():
        right = decode(td["target", "tokens"][b, k][None], td["target", "mask"][b, k][None])
        texts = decode(td["rollout", "tokens"][b, k], td["rollout", "mask"][b, k])
        assert reward[b, k].tolist() == common(texts, right * 4)


def test_references_by_sequence():
    td = batch()
    asked = []

    def score(texts, references):
        asked.extend(references)
        return [len(text) + 100.0 * reference[0] for text, reference in zip(texts, references, strict=True)]

    found = verifier(score, decode=decode, references=lambda number: [number])(td.exclude("target"))[schema.REWARD]
    length = td["rollout", "mask"].sum(-1)
    expected = torch.where(td["anchor_mask"][..., None], length + torch.tensor([1000.0, 1100.0])[:, None, None], 0.0)
    assert torch.equal(found, expected)
    assert asked == [[10]] * 12 + [[11]] * 8


@pytest.mark.parametrize("estimator", ["rloo", "mean", "group_norm", "none"])
def test_advantage_is_that_of_a_plain_reward(estimator):
    td = verifier(common, decode=decode, estimator=estimator)(batch())
    reward, found, n = td[schema.REWARD], td[schema.ADVANTAGE], 4
    expected = {
        "none": reward,
        "group_norm": (reward - reward.mean(-1, keepdim=True)) / reward.std(-1, keepdim=True).clamp(min=1e-9),
    }.get(estimator, reward - (reward.sum(-1, keepdim=True) - reward) / (n - 1))
    torch.testing.assert_close(found, expected)
    assert found.abs().max() > 0.1


def test_metrics_are_of_anchors():
    td = verifier(common, decode=decode)(batch())
    reward = td[schema.REWARD]
    torch.testing.assert_close(td["metrics", "reward_spread"], reward.std(-1))
    same = (reward == reward[..., :1]).all(-1) & td["anchor_mask"]
    assert torch.equal(td["metrics", "zero_spread_groups"], same.float())
    single = verifier(common, decode=decode, estimator="none")(batch(shape=(2, 3, 1, 5)))
    assert single["metrics", "reward_spread"].eq(0).all()
    assert torch.equal(single["metrics", "zero_spread_groups"], single["anchor_mask"].float())


@pytest.mark.parametrize("estimator", ["rloo", "rloo_tuned", "group_norm", "none"])
def test_masked_anchors_get_zeros_and_are_not_asked_about(estimator):
    td, asked = batch(), []

    def score(texts, references):
        asked.extend(texts)
        return [5.0 + len(text) for text in texts]

    stage = verifier(score, decode=decode, estimator=estimator)
    found = stage(td.clone())
    assert len(asked) == 5 * 4
    for key in (schema.REWARD, schema.ADVANTAGE, *map(schema.metric, verifiers.METRICS)):
        assert found[key][-1, -1].eq(0).all()
    td["rollout", "tokens"][-1, -1] = 25  # whatever they hold
    td["target", "tokens"][-1, -1] = 25
    assert torch.equal(stage(td)[schema.ADVANTAGE], found[schema.ADVANTAGE])
    td["anchor_mask"][:] = False
    asked.clear()
    assert stage(td)[schema.REWARD].eq(0).all()
    assert asked == []


def test_group_scores_see_one_anchor_and_follow_its_order():
    """Permuting the rollouts of every anchor permutes their rewards and advantages."""
    td, sizes = batch(), []

    def novelty(texts, reference):
        sizes.append((len(texts), type(reference)))
        return [1 / texts.count(text) + 0.1 * len(reference) + 0.01 * len(text) for text in texts]

    stage = verifier(novelty, decode=decode, group=True)
    found = stage(td.clone())
    assert sizes == [(4, str)] * 5
    order = torch.tensor([2, 0, 3, 1])
    td["rollout"] = td["rollout"].apply(lambda x: x[:, :, order])
    permuted = stage(td)
    for key in (schema.REWARD, schema.ADVANTAGE):
        torch.testing.assert_close(permuted[key], found[key][:, :, order], rtol=0, atol=1e-6)
    assert found[schema.REWARD].std(-1).max() > 0


def test_rewards_of_other_types():
    td = batch()
    assert (
        verifier(lambda texts, _: [len(text) > 2 for text in texts], decode=decode)(td.clone())[schema.REWARD].dtype
        == torch.float32
    )
    double = verifier(lambda texts, _: torch.ones(len(texts), dtype=torch.float64) / 3, decode=decode)(td)
    assert double[schema.REWARD][0, 0, 0] == 1 / 3


def test_a_reward_that_is_not_finite_is_named_with_its_text():
    td = batch()
    b, k, n = 1, 1, 2
    td["rollout", "tokens"][b, k, n], td["rollout", "mask"][b, k, n] = torch.tensor([25, 24, 23, 0, 0]), True
    for bad in (float("nan"), float("inf")):

        def score(texts, _, bad=bad):
            return [bad if text.startswith("zyx") else 1.0 for text in texts]

        with pytest.raises(UsageError, match=f"{bad} of rollout 2 of anchor 1 of sequence 1.*'zyxaa'"):
            verifier(score, decode=decode)(td)


def test_a_score_of_the_wrong_size_is_refused():
    with pytest.raises(UsageError, match=r"shape \[3\] for 20 texts.*\[20\]"):
        verifier(lambda texts, _: [1.0, 2.0, 3.0], decode=decode)(batch())
    with pytest.raises(UsageError, match=r"shape \[20\] for 4 texts"):
        verifier(lambda texts, _: torch.ones(20), decode=decode, group=True)(batch())
    with pytest.raises(UsageError, match="estimator='gae'"):
        verifier(common, decode=decode, estimator="gae")(batch())


def test_reward_advantage_of_one_group():
    found = reward_advantage(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(found, torch.tensor([1.0, -1 / 3, -1 / 3, -1 / 3]))
