"""What whole answers to held-out prompts are worth: tests passed, programs that compile, likeness to references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from ebft import sandbox, schema
from ebft.data.examples import Example
from ebft.loops.evaluation import quantities as names
from ebft.loops.evaluation.answers import best_of_k, bleu_statistics, pass_at_k
from ebft.loops.evaluation.quantities import Quantity
from ebft.loops.evaluation.rollouts import EVALUATION_STEP
from ebft.loops.stages import at_step
from ebft.objectives.programs import compiles, programs
from ebft.objectives.verifiers import bleu, chrf, exact_match, results_of_tests
from ebft.samplers import full
from ebft.samplers.component import Engine

PASS, COMPILES, EXACT = "pass_at_k", "compiles", "exact_match"
PROGRAMS = "programs_{}"  # with a reason of `sandbox.Result`: the share of programs that ended so
SENTENCE_BLEU, SENTENCE_CHRF = "sentence_bleu", "sentence_chrf"
DISTINCT, TOKENS, ENDED = "distinct_answers", "answer_tokens", "answers_ended"


@torch.no_grad()
def measure_answers(
    engine: Engine,
    decode: Callable[[Tensor, Tensor], list[str]],
    data: TensorDictBase,
    examples: Sequence[Example],
    *,
    samples: int,
    max_new_tokens: int,
    ks: Sequence[int],
    batch_size: int,
    seed: int,
    eos: int,
    device: torch.device,
    test_prompt: bool | None = None,
    fenced: bool = False,
    timeout: float = 5.0,
    **sampling: Any,
) -> Iterator[tuple[dict[Quantity, tuple[Tensor, Tensor]], list[list[str]]]]:
    """Draw answers to every prompt and see what they are worth, batch by batch.

    Args:
        engine: `CausalPolicy.sample`, or any function with its arguments and results.
        decode: (tokens [M,G], mask [M,G]) -> M strings.
        data: a prompt a row, batch size [M]; examples: of the rows, in their order.
        samples: N, answers to each prompt; ks: of pass@k and best-of-k, each 1 to N.
        test_prompt: whether programs are prompt + answer, or the answer alone; None: prompt + answer of the examples
            whose prompt with the reference is a program.
        fenced: take programs out of Markdown fences (`programs`).
        timeout: seconds for the tests of one program.
        sampling: temperature, ... of the engine.

    Yields:
        Totals of a batch, [B] each, and the answers, N to each prompt.
    """
    begin = 0
    for td in data.split(batch_size):
        own = examples[begin : begin + len(td)]
        begin += len(td)
        td = at_step(td.to(device).clone(False), seed=seed, step=EVALUATION_STEP)
        tokens, _, mask = full.sample(
            engine, td[schema.TOKENS], td[schema.MASK], full.prompt_lengths(td[schema.MASK]), rollouts=samples,
            max_new_tokens=max_new_tokens, eos=eos, seed=td[schema.SEED], sequence_ids=td[schema.SEQUENCE_IDS],
            **sampling,
        )  # fmt: skip
        flat = decode(tokens[:, 0].flatten(0, 1), mask[:, 0].flatten(0, 1))
        texts = [flat[i : i + samples] for i in range(0, len(flat), samples)]
        ended = ((tokens == eos) & mask).any(-1)[:, 0]
        found = answer_totals(texts, own, ks=ks, test_prompt=test_prompt, fenced=fenced, timeout=timeout)
        found[Quantity(TOKENS)] = _mean_over_answers(mask[:, 0].sum(-1))
        found[Quantity(ENDED)] = _mean_over_answers(ended)
        yield found, texts


def answer_totals(
    texts: Sequence[Sequence[str]],
    examples: Sequence[Example],
    *,
    ks: Sequence[int],
    test_prompt: bool | None = None,
    fenced: bool = False,
    timeout: float = 5.0,
) -> dict[Quantity, tuple[Tensor, Tensor]]:
    """What N answers to each of B prompts are worth, totals [B] each.

    Where any example has tests: pass@k of those that have, the shares of their programs that passed, failed, ... (the
    reasons of `sandbox.Result`), and the share of programs that compile. For all: exact match, sentence BLEU and chrF,
    in the mean and as best-of-k (the best of k answers by that metric itself, which looks at the reference), the parts
    of corpus BLEU over all answers, and the share of different answers.
    """
    flat = [text for group in texts for text in group]
    samples = len(texts[0])
    repeated = [example for example in examples for _ in range(samples)]
    right = [example.answer for example in repeated]
    found: dict[Quantity, tuple[Tensor, Tensor]] = {}
    if any(example.tests for example in examples):
        sources = programs(flat, [e.prompt for e in repeated], right, together=test_prompt, fenced=fenced)
        tested = torch.tensor([bool(example.tests) for example in examples])
        kept = [i for i, example in enumerate(repeated) if example.tests]
        results = results_of_tests([sources[i] for i in kept], [list(repeated[i].tests) for i in kept], timeout=timeout)
        ended = {reason: torch.zeros(len(flat)) for reason in sandbox.REASONS}
        for i, (result,) in zip(kept, results, strict=True):
            ended[result.reason][i] = 1.0
        for k in ks:
            passed = pass_at_k(ended["passed"].view(-1, samples), k=k)
            found[Quantity(PASS, at=k)] = (torch.where(tested, passed, 0.0), tested.double())
        for reason, values in ended.items():
            found[Quantity(PROGRAMS.format(reason))] = (values.view(-1, samples).double().mean(-1), tested.double())
        built = torch.tensor([compiles(source) for source in sources]).view(-1, samples)
        found[Quantity(COMPILES)] = _mean_over_answers(built)
    scores = {
        EXACT: exact_match(flat, right),
        SENTENCE_BLEU: bleu(flat, right),
        SENTENCE_CHRF: chrf(flat, right),
    }
    for name, values in scores.items():
        for k in ks:
            best = best_of_k(values.view(-1, samples), k=k)
            found[Quantity(name, at=k)] = (best, torch.ones_like(best))
    statistics = bleu_statistics(flat, right).view(len(texts), samples, -1).sum(1)
    for i, column in enumerate(statistics.unbind(-1)):
        found[Quantity(names.BLEU_STATISTICS, at=i)] = (column, torch.ones_like(column))
    distinct = torch.tensor([len(set(group)) / samples for group in texts], dtype=torch.float64)
    found[Quantity(DISTINCT)] = (distinct, torch.ones_like(distinct))
    return found


def _mean_over_answers(values: Tensor) -> tuple[Tensor, Tensor]:
    """[B,N] to the mean over N [B], with a count of 1."""
    mean = values.double().mean(-1).cpu()
    return mean, torch.ones_like(mean)
