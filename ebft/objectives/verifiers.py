"""Verifiable rewards: from the texts of rollouts to numbers, and as a step of a pipeline.

Every score is a function (texts, references) -> one reward per text, so that one of your own is as good as these.
Rewards are not differentiated: they meet the policy gradient through ``baselines.advantage``. Unit tests and BLEU are
those of the RLVR runs that arXiv 2603.12248 compares with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from tensordict.utils import NestedKey
from torch import Tensor

from ebft import sandbox, schema
from ebft.distributed import by_items
from ebft.errors import UsageError
from ebft.objectives.baselines import advantage, zero_spread

# (texts, references), one reference per text -> a reward per text; or with the texts of one anchor and its reference
Score = Callable[..., "Tensor | Sequence[float]"]
Decode = Callable[[Tensor, Tensor], list[str]]  # tokens [M,G], mask [M,G] -> M strings

TOKENIZERS = ("13a", "intl", "char", "zh", "none")  # those of sacrebleu that need no other package and no download
METRICS = ("reward_spread", "zero_spread_groups")
SHOWN = 200  # characters of a text in an error


def collapse(text: str) -> str:
    """`text` without white space at its ends, and with one space for every other run of it."""
    return " ".join(text.split())


def exact_match(
    texts: Sequence[str], references: Sequence[str | Sequence[str]], *, normalize: Callable[[str], str] = collapse
) -> Tensor:
    """1 where a text is one of its references, 0 elsewhere: [M].

    Args:
        texts: M strings; references: for each a string, or several of which any will do.
        normalize: applied to texts and references before they are compared.
    """
    check_references(texts, references)
    wanted = [{normalize(reference) for reference in _several(references_)} for references_ in references]
    return torch.tensor([float(normalize(text) in right) for text, right in zip(texts, wanted, strict=True)])


def bleu(
    texts: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    tokenize: str = "13a",
    lowercase: bool = False,
) -> Tensor:
    """Sentence BLEU of sacrebleu, divided by 100: in [0, 1], shape [M].

    Orders for which a text is too short are left out (sacrebleu's ``effective_order``) and counts of 0 are smoothed
    exponentially, both as sacrebleu advises for sentences. The mean over sentences is not the BLEU of a corpus.

    Args:
        texts: M strings; references: for each a string or several.
        tokenize: "13a", "intl", "char", "zh" or "none" of sacrebleu.
        lowercase: whether upper and lower case are the same.
    """
    from sacrebleu.metrics import BLEU

    if tokenize not in TOKENIZERS:
        raise UsageError(f"tokenize={tokenize!r} is not known; expected one of {', '.join(TOKENIZERS)}")
    return _sentence_scores(BLEU(tokenize=tokenize, lowercase=lowercase, effective_order=True), texts, references)


def chrf(
    texts: Sequence[str],
    references: Sequence[str | Sequence[str]],
    *,
    word_order: int = 0,
    lowercase: bool = False,
) -> Tensor:
    """Sentence chrF of sacrebleu, divided by 100: in [0, 1], shape [M].

    Args:
        texts: M strings; references: for each a string or several, of which the best counts.
        word_order: the longest n-grams of words to count next to those of up to 6 characters; 2 is chrF++.
        lowercase: whether upper and lower case are the same.
    """
    from sacrebleu.metrics import CHRF

    if not (isinstance(word_order, int) and word_order >= 0):
        raise UsageError(f"word_order={word_order!r}: expected a whole number of at least 0")
    return _sentence_scores(CHRF(word_order=word_order, lowercase=lowercase), texts, references)


def unit_tests(programs: Sequence[str], tests: Sequence[Sequence[str]], **options: Any) -> Tensor:
    """Which programs pass their tests, [M] in [0, 1]: the share of their results that are "passed".

    Args: as in `results_of_tests`, with its options.
    """
    results = results_of_tests(programs, tests, **options)
    return torch.tensor([sum(result.passed for result in own) / len(own) for own in results])


def results_of_tests(
    programs: Sequence[str],
    tests: Sequence[Sequence[str]],
    *,
    credit: str = "all",
    timeout: float = 5.0,
    memory: int = 512,
    workers: int | None = None,
    isolation: str | None = None,
) -> list[list[sandbox.Result]]:
    """What became of programs and their tests, run by ``ebft.sandbox`` (its head says what a pass is worth).

    Args:
        programs: M Python sources; tests: for each the sources of its tests, at least one, which raise on failure.
        credit: "all": one run of a program with all of its tests; "share": one run for each test, so that none can
            spoil the others.
        timeout, memory, isolation: of ``sandbox.run``; the timeout is for one run.
        workers: runs at a time, one per processor when None.

    Returns:
        For each of M programs its results, one or as many as it has tests. Programs that occur more than once with the
        same tests are run once.

    Raises:
        UsageError: an option out of its range, not one list of tests for each program, or an empty one.
    """
    if credit not in ("all", "share"):
        raise UsageError(f"credit={credit!r} is not known; expected 'all' or 'share'")
    check_references(programs, tests)
    for index, sources in enumerate(tests):
        if isinstance(sources, str) or not sources:
            raise UsageError(f"tests[{index}]={sources!r}: expected a list of at least one test")
    runs = [
        [(program, test) for test in (sources if credit == "share" else ["\n".join(sources)])]
        for program, sources in zip(programs, tests, strict=True)
    ]
    distinct = list(dict.fromkeys(job for jobs in runs for job in jobs))
    results = sandbox.run_all(distinct, workers=workers, timeout=timeout, memory=memory, isolation=isolation)
    found = dict(zip(distinct, results, strict=True))
    return [[found[job] for job in jobs] for jobs in runs]


def reward_advantage(reward: Tensor, *, estimator: str = "rloo", mask: Tensor | None = None) -> Tensor:
    """``baselines.advantage`` of plain rewards [...,N], which have no diversity term.

    A rollout's reward does not depend on the others, so "rloo" and "mean" are the same here, and unbiased.
    """
    alone = reward.new_zeros(*reward.shape, reward.shape[-1])
    return advantage(reward / 2, alone, estimator=estimator, diversity=0.0, mask=mask)


def plain_reward(
    reward: Tensor, anchor_mask: Tensor, *, estimator: str = "rloo"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a stage writes of plain rewards [B,K,N] that are 0 at masked anchors, in the order of its keys.

    Returns:
        Reward [B,K,N], advantage [B,K,N] (0 at masked anchors), and the metrics ``reward_spread`` and
        ``zero_spread_groups``, [B,K].
    """
    gain = torch.where(anchor_mask[..., None], reward_advantage(reward, estimator=estimator, mask=anchor_mask), 0.0)
    spread = reward.std(-1) if reward.shape[-1] > 1 else torch.zeros_like(reward[..., 0])
    same = zero_spread(reward, scale=reward.abs().amax(-1)) & anchor_mask
    return reward, gain, spread, same.to(gain.dtype)


def verifier(
    score: Score,
    *,
    decode: Decode,
    references: Callable[[int], Any] | None = None,
    group: bool = False,
    estimator: str = "rloo",
    by: NestedKey = schema.SEQUENCE_IDS,
) -> TensorDictModuleBase:
    """A module that writes reward and advantage, [B,K,N] and 0 at masked anchors, from the texts of the rollouts.

    It is `verify` and then `verified`, which may as well be stages of their own.

    Args: of these two.
    """
    judge = verify(score, decode=decode, references=references, group=group, by=by)
    return TensorDictSequential(judge, verified(decode=decode, estimator=estimator))


def verify(
    score: Score,
    *,
    decode: Decode,
    references: Callable[[int], Any] | None = None,
    group: bool = False,
    by: NestedKey = schema.SEQUENCE_IDS,
) -> TensorDictModule:
    """A module that writes `schema.VERIFIED` [B,K,N], what a score says of the rollouts; 0 at masked anchors.

    Rows are independent, so that those that are there can be judged while others are drawn (`ebft.loops.overlap`).

    Args:
        score: (texts, references) -> rewards, M strings and M references of all rollouts of all real anchors of
            the rows that are there; of several processes (`ebft.distributed`) each scores its share of the anchors.
        decode: (tokens [M,G], mask [M,G]) -> M strings, the continuations without their context.
        references: the reference of a sequence, by its number in `by` (an answer, a list of tests, anything `score`
            takes). None: the text of the anchor's target.
        group: whether `score` is called for one anchor at a time, with its N texts and its reference, so that the
            reward of one rollout may depend on the others. What a baseline makes of the others' rewards then depends on
            the rollout that it corrects, so that no estimator but "none" is unbiased for such a reward.
        by: entry [B] of int64 that tells sequences apart: their ids, or ``schema.EXAMPLE`` of rows of prompts, which
            also tells apart those with equal prompts.
    """

    def rewards(groups: list[list[str]], right: list[Any]) -> Tensor:
        count = len(groups[0])
        if not group:
            texts = [text for own in groups for text in own]
            repeated = [reference for reference in right for _ in range(count)]
            return _as_rewards(score(texts, repeated), len(texts)).view(-1, count)
        pairs = zip(groups, right, strict=True)
        return torch.stack([_as_rewards(score(own, reference), count) for own, reference in pairs])

    def judge(tokens: Tensor, mask: Tensor, anchor_mask: Tensor, *about: Tensor) -> Tensor:
        count = tokens.shape[2]
        reward = torch.zeros(tokens.shape[:3], device=tokens.device)
        if anchor_mask.any():
            texts = decode(tokens[anchor_mask].flatten(0, 1), mask[anchor_mask].flatten(0, 1))
            if references is None:
                right: list[Any] = decode(*(x[anchor_mask] for x in about))
            else:
                right = [references(int(about[0][b])) for b in anchor_mask.nonzero()[:, 0].tolist()]
            values = by_items(rewards, _chunks(texts, count), right).to(tokens.device)
            reward = reward.to(values.dtype).masked_scatter(anchor_mask[..., None], values)
        return reward

    about = [schema.TARGET_TOKENS, schema.TARGET_MASK] if references is None else [by]
    return TensorDictModule(
        judge,
        in_keys=[schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK, schema.ANCHOR_MASK, *about],
        out_keys=[schema.VERIFIED],
        strict=True,
    )


def verified(*, decode: Decode, estimator: str = "rloo") -> TensorDictModule:
    """A module that writes reward and advantage, [B,K,N] and 0 at masked anchors, of what `verify` wrote.

    It also writes the metrics ``reward_spread`` and ``zero_spread_groups``, [B,K], as ``component.objective`` does.

    Args:
        decode: as in `verify`, for the error.
        estimator: of ``baselines.advantage``.

    Raises:
        UsageError: when run, a verdict that is not finite; it shows the text.
    """

    def reward_and_advantage(reward: Tensor, anchor_mask: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        check_finite(reward, tokens, mask, decode)
        return plain_reward(reward, anchor_mask, estimator=estimator)

    return TensorDictModule(
        reward_and_advantage,
        in_keys=[schema.VERIFIED, schema.ANCHOR_MASK, schema.ROLLOUT_TOKENS, schema.ROLLOUT_MASK],
        out_keys=[schema.REWARD, schema.ADVANTAGE, *map(schema.metric, METRICS)],
        strict=True,
    )


def check_references(texts: Sequence[str], references: Sequence[Any]) -> None:
    """Check that there is one reference, or list of them, per text."""
    for name, value in (("texts", texts), ("references", references)):
        if isinstance(value, str):
            raise UsageError(f"{name} is the one string {value[:SHOWN]!r}; expected a list of strings")
    if len(texts) != len(references):
        raise UsageError(f"{len(texts)} texts but {len(references)} references; expected one for each text")


def check_finite(reward: Tensor, tokens: Tensor, mask: Tensor, decode: Decode, *, name: str = "reward") -> None:
    """Check that all of `reward` [B,K,N] is finite; the error shows the text of the first rollout where it is not."""
    for b, k, n in (~reward.isfinite()).nonzero()[:1].tolist():
        text = decode(tokens[b, k, n][None], mask[b, k, n][None])[0]
        raise UsageError(
            f"{name} {reward[b, k, n].item()} of rollout {n} of anchor {k} of sequence {b} of the batch: expected a"
            f" finite number. The rollout's text: {text[:SHOWN]!r}"
        )


def _chunks(texts: list[str], count: int) -> list[list[str]]:
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def _several(references: str | Sequence[str]) -> Sequence[str]:
    return [references] if isinstance(references, str) else references


def _sentence_scores(metric: Any, texts: Sequence[str], references: Sequence[str | Sequence[str]]) -> Tensor:
    check_references(texts, references)
    pairs = zip(texts, references, strict=True)
    return torch.tensor([metric.sentence_score(text, list(_several(right))).score / 100 for text, right in pairs])


def _as_rewards(values: Tensor | Sequence[float], count: int) -> Tensor:
    rewards = torch.as_tensor(values)
    if rewards.shape != (count,):
        raise UsageError(
            f"the score returned shape {list(rewards.shape)} for {count} texts: expected one number for each, [{count}]"
        )
    return rewards if rewards.is_floating_point() else rewards.float()
