"""From prompts to a policy that answers them: rows of prompts, answers, a verifier, REINFORCE."""

from functools import partial

import pytest
import torch

from ebft import schema
from ebft.assemble import resolve_run, settle
from ebft.assemble.reward import build_reward, decoder
from ebft.data import Example, prompt_rows
from ebft.loops.scoring import score
from ebft.loops.stages import at_step
from ebft.objectives.losses import EBFTLoss
from ebft.objectives.verifiers import exact_match, verifier
from ebft.policy import CausalPolicy
from ebft.samplers.anchors import single
from ebft.samplers.component import sampler
from ebft.samplers.full import prompt_lengths
from tests.models import plain_logits

PROMPTS = ("def f", "for index in range(", "1 + ", "def f")


@pytest.fixture
def policy(tiny_folder):
    return CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32")


def answers(policy, *, rollouts):
    place = lambda mask: single(prompt_lengths(mask))  # noqa: E731
    return sampler(
        place, policy.sample, horizon=1, documents=False, rollouts=rollouts, eos=policy.tokenizer.eos_token_id
    )


def probabilities(policy, prompt):
    """Of the token after a prompt, [V], by a plain forward pass."""
    with policy.plain(), torch.no_grad():
        return plain_logits(policy.model, torch.tensor(policy.tokenizer(prompt)["input_ids"]))[-1].softmax(-1)


def likely_answer(policy, prompt):
    """The text of the likeliest token that is a text of its own, not a part of a character."""
    for token in probabilities(policy, prompt).argsort(descending=True).tolist():
        text = policy.tokenizer.decode(token)
        if policy.tokenizer(text)["input_ids"] == [token] and token != policy.tokenizer.eos_token_id:
            return text
    raise AssertionError("no token is a text")


def success(policy, examples):
    """Probability of each example's answer, a single token: [M]."""
    tokens = [policy.tokenizer(example.answer)["input_ids"] for example in examples]
    return torch.stack([probabilities(policy, e.prompt)[token] for e, (token,) in zip(examples, tokens, strict=True)])


def test_reinforce_on_an_exact_match_makes_the_answers_likely(policy):
    examples = [Example(str(i), prompt, likely_answer(policy, prompt)) for i, prompt in enumerate(PROMPTS)]
    rows = prompt_rows(examples, policy.tokenizer, length=32)
    stages = [
        answers(policy, rollouts=64),
        verifier(
            partial(exact_match, normalize=str),
            decode=decoder(policy.tokenizer),
            references=lambda number: examples[number].answer,
            by=schema.EXAMPLE,
        ),
    ]
    loss = EBFTLoss()
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=5e-3)
    before = success(policy, examples)
    for step in range(10):
        td = at_step(rows.clone(), seed=0, step=step)
        for stage in stages:
            td = stage(td)
        if step == 0:
            standard_error = (before * (1 - before) / 64).sqrt()
            assert ((td[schema.REWARD].mean(-1)[:, 0] - before).abs() < 4 * standard_error).all()
        score(policy, td)
        optimizer.zero_grad()
        loss(td)["loss_policy_gradient"].backward()
        optimizer.step()
    after = success(policy, examples)
    assert (after > before + 0.2).all(), (before, after)


def test_equal_prompts_are_rewarded_by_their_own_answers(policy):
    """Row 3 repeats the prompt of row 0, so its rollouts and its sequence id as well; its answer is another."""
    examples = [Example(str(i), prompt, f"no {i}") for i, prompt in enumerate(PROMPTS)]
    rows = at_step(prompt_rows(examples, policy.tokenizer, length=32), seed=0, step=0)
    td = answers(policy, rollouts=8)(rows)
    assert td[schema.SEQUENCE_IDS][0] == td[schema.SEQUENCE_IDS][3]
    tokens = td[schema.ROLLOUT_TOKENS][:, 0, :, 0]
    assert torch.equal(tokens[0], tokens[3])
    right = {n: policy.tokenizer.decode(tokens[n, 0 if n < 3 else 5].tolist()) for n in range(4)}
    assert right[0] != right[3]
    kwargs = {"decode": decoder(policy.tokenizer), "by": schema.EXAMPLE}
    reward = verifier(partial(exact_match, normalize=str), references=right.__getitem__, **kwargs)(td)[schema.REWARD]
    for n, text in right.items():
        expected = [float(policy.tokenizer.decode(token) == text) for token in tokens[n].tolist()]
        assert reward[n, 0].tolist() == expected


@pytest.mark.parametrize("chat", [False, True])
def test_programs_are_rewarded_by_their_tests(policy, options, chat):
    """By the options of a run, on problems with tests; the rollouts are set by hand."""
    prompt = "def f(x):\n"
    examples = [
        Example("0", prompt, "    return x\n", ("assert f(3) == 3",)),
        Example("1", prompt, "    return x + 1\n", ("assert f(3) == 4", "assert f(0) == 1")),
    ]
    chosen = options | {"objective": "verifier", "verifier": "unit_tests", "test_prompt": True, "chat": chat}
    stage = build_reward(
        settle(chosen),
        resolve_run(chosen),
        decode=decoder(policy.tokenizer),
        examples=examples.__getitem__,
        by=schema.EXAMPLE,
    )
    td = at_step(prompt_rows(examples, policy.tokenizer, length=32), seed=0, step=0)
    said = ["    return x\n", "    return x + 1\n", "    raise SystemExit(0)\n", "```\n    return x"]
    encoded = [torch.tensor(ids) for ids in policy.tokenizer(said)["input_ids"]]
    tokens = torch.nn.utils.rnn.pad_sequence(encoded, batch_first=True, padding_value=-1)
    td[schema.ROLLOUT_TOKENS] = tokens.clamp(min=0).expand(2, 1, -1, -1)
    td[schema.ROLLOUT_MASK] = (tokens >= 0).expand(2, 1, -1, -1)
    td[schema.ANCHOR_MASK] = torch.ones(2, 1, dtype=torch.bool)
    assert stage(td)[schema.REWARD][:, 0].tolist() == [[1, 0, 0, chat], [0, 1, 0, 0]]
