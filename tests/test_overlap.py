"""Texts of some rollouts of a batch are embedded and judged while others are drawn."""

import io
import threading
from itertools import product

import pytest
import torch
from rich.console import Console
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from ebft import schema
from ebft.assemble import plan_from_options, resolve_run
from ebft.commands.derived import run_defaults
from ebft.errors import UsageError
from ebft.features.module import as_module
from ebft.features.text import from_text_function
from ebft.loops.overlap import overlapped, sizes
from ebft.loops.stages import at_step
from ebft.objectives.verifiers import verify
from tests.runs import go, metrics, parts, tiny_options, write_problems

PATIENCE = 60  # seconds until a test that waits in vain fails


def uneven(rows):
    """Five rows with room for 0, 3, 1, 2 and 3 anchors; the first has a document for every four tokens."""
    rows = rows[:5].clone()
    ids = rows[schema.DOCUMENT_IDS]
    ids[:] = 0
    ids[0] = torch.arange(ids.shape[1]) // 4
    ids[2, 10:] = 1 + torch.arange(ids.shape[1] - 10) // 4
    ids[3, 20:] = 1 + torch.arange(ids.shape[1] - 20) // 4
    return rows


@pytest.fixture(scope="module")
def stages(tiny_folder, tiny_text):
    """Sampling, features of texts and rewards of texts, and five rows."""
    policy, pipeline, rows = parts(tiny_options(tiny_folder, tiny_text))
    decode = lambda tokens, mask: policy.tokenizer.batch_decode(  # noqa: E731
        [row[keep].tolist() for row, keep in zip(tokens, mask, strict=True)]
    )
    letters = lambda texts: torch.tensor([[float(text.count(c)) for c in "aeiou \n"] for text in texts])  # noqa: E731
    embed = as_module(from_text_function(letters, policy.tokenizer), documents=True)
    judge = verify(
        lambda texts, right: [len(set(t) & set(r)) for t, r in zip(texts, right, strict=True)], decode=decode
    )
    return pipeline["sample"], embed, judge, uneven(rows)


def test_parts_are_even():
    for rows, count in product(range(1, 12), range(1, 12)):
        found = sizes(rows, count)
        assert sum(found) == rows
        assert len(found) == min(rows, count)
        assert max(found) - min(found) <= 1


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
def test_it_writes_what_the_stages_write_one_after_the_other(stages, count):
    sample, embed, judge, rows = stages
    wanted = judge(embed(sample(at_step(rows.clone(), seed=3, step=1))))
    assert wanted[schema.ANCHOR_MASK].sum(1).tolist() == [0, 3, 1, 2, 3]
    place, *draw = sample
    found = overlapped(place, draw, [embed, judge], parts=count)(at_step(rows.clone(), seed=3, step=1))
    assert set(found.keys(True, True)) == set(wanted.keys(True, True))
    assert wanted[schema.VERIFIED].std() > 0
    for key in wanted.keys(True, True):
        torch.testing.assert_close(found[key], wanted[key], atol=1e-5 * wanted[key].is_floating_point(), rtol=0)


def same(td):
    return td


def rows_of(count):
    return TensorDict({schema.TOKENS: torch.arange(count)[:, None]}, [count])


def stage(function, key):
    return TensorDictModule(function, in_keys=[schema.TOKENS], out_keys=[key], strict=True)


def test_a_part_is_judged_while_the_next_one_is_drawn():
    """Each waits for the other: one after the other they would never end."""
    drawn, judged = [threading.Event() for _ in range(3)], [threading.Event() for _ in range(3)]
    threads = set()

    def sample(tokens):
        number = int(tokens[0]) // 2
        drawn[number].set()
        if number:
            assert judged[number - 1].wait(PATIENCE)
        return tokens + 100

    def judge(tokens):
        number = int(tokens[0]) // 2
        threads.add(threading.current_thread())
        assert number == 2 or drawn[number + 1].wait(PATIENCE)
        judged[number].set()
        return tokens * 10

    td = overlapped(same, [stage(sample, "drawn")], [stage(judge, "judged")], parts=3)(rows_of(5))
    assert td["drawn"][:, 0].tolist() == [100, 101, 102, 103, 104]
    assert td["judged"][:, 0].tolist() == [0, 10, 20, 30, 40]
    assert len(threads) == 1
    assert threading.current_thread() not in threads
    assert not any(thread.is_alive() for thread in threads)


def test_an_error_of_either_ends_both():
    begun = []

    def fail(tokens):
        begun.append(int(tokens[0]))
        raise UsageError("no verdict")

    with pytest.raises(UsageError, match="no verdict"):
        overlapped(same, [stage(lambda x: x, "drawn")], [stage(fail, "judged")], parts=2)(rows_of(4))

    wait, judged = threading.Event(), []

    def sample(tokens):
        if int(tokens[0]) == 4:
            wait.set()
            raise KeyboardInterrupt
        return tokens

    def slow(tokens):
        assert wait.wait(PATIENCE)
        judged.append(int(tokens[0]))
        return tokens

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        overlapped(same, [stage(sample, "drawn")], [stage(slow, "judged")], parts=5)(rows_of(5))
    assert judged[:1] == [0]
    assert len(judged) < 4  # those that had not begun were left
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def options(tiny_folder, tmp_path_factory):
    """Of a tiny run of rlvr on prompts."""
    data = write_problems(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", count=24)
    return run_defaults() | {
        "method": "rlvr", "policy": str(tiny_folder), "data": str(data), "device": "cpu", "dtype": "float32", "lora": 0,
        "length": 48, "max_new_tokens": 6, "rollouts": 4, "verifier": "chrf", "steps": 3, "batch": 3, "lr": 0.01,
        "held_out": 4, "save_every": 3,
    }  # fmt: skip


def test_a_run_is_the_same(options, tmp_path):
    go(options, tmp_path / "whole")
    go({**options, "overlap": 2}, tmp_path / "parts")
    whole, found = (metrics(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) == len(found) == 3
    assert len({row["reward"] for row in whole}) > 1
    for ours, theirs in zip(found, whole, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            wanted = pytest.approx(float(value), rel=1e-3, abs=1e-5) if value else ""
            assert (float(ours[name]) if ours[name] else "") == wanted, name


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"method": "ebft", "verifier": None, "features": "hidden"}, "--overlap 2: nothing of this run is the host's"),
        ({"method": "sft", "verifier": None, "features": "sbert"}, "--overlap 2: nothing of this run is the host's"),
        ({"method": "ebft", "verifier": None, "features": "sbert", "pg_weight": 0.0}, "nothing of this run"),
        ({"overlap": 4}, "--overlap 4: a batch of 3 has no more parts"),
        ({"overlap": 0}, "--overlap 0: expected a number >= 1"),
        ({"shard": True}, "--overlap 2 with --shard"),
    ],
)
def test_what_has_nothing_to_overlap_is_said(options, chosen, message):
    given = {**options, "overlap": 2, **chosen}
    if given["method"] != "rlvr":
        given |= {"max_new_tokens": None, "rollouts": 4}
    with pytest.raises(UsageError, match=message):
        resolve_run(given)


def test_texts_and_verifiers_may_overlap(options):
    of_answers = {"max_new_tokens": None, "verifier": None}
    for chosen in ({"method": "mixed", "features": "hidden"}, {"method": "ebft", "features": "sbert", **of_answers}):
        assert resolve_run({**options, **chosen, "overlap": 2})["features"]


def test_parts_are_planned_of_the_share_of_a_process(tiny_folder, tiny_text):
    given = tiny_options(tiny_folder, tiny_text) | {"features": "sbert", "batch": 8, "overlap": 4}
    with pytest.raises(UsageError, match="--overlap 4: a batch of 8 of which each of 4 processes has 2"):
        plan_from_options(given, processes=4, console=Console(file=io.StringIO()))


def test_less_is_planned_for_what_is_drawn_at_once(tiny_folder, tiny_text):
    given = tiny_options(tiny_folder, tiny_text) | {"features": "sbert", "batch": 8, "held_out": 2, "kl": 0.0}
    silent = Console(file=io.StringIO())
    plans = [plan_from_options({**given, "overlap": parts}, processes=1, console=silent) for parts in (1, 4)]
    assert plans[1].stages["sample"] < plans[0].stages["sample"]
