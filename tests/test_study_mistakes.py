"""What a study refuses, before it leaves anything."""

import pytest

from ebft.errors import UsageError
from tests.runs import write_problems
from tests.test_study import command, invoke


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": "sft,ebtf"}, "did you mean 'ebft'"),
        ({"arms": "base"}, "applies to no arm"),
        ({"lr_grid": "sft=0.1,0.1"}, "--lr-grid sft=0.1,0.1: expected different numbers"),
        ({"lr_grid": "sft=fast"}, "--lr-grid sft=fast"),
        ({"lr_grid": "stf=0.1"}, "--lr-grid stf: no arm has this name"),
        ({"budget": "tiny"}, "--budget tiny: unknown budget"),
        ({"seeds": "0,0"}, "--seeds '0,0'"),
        ({"criterion": "luck"}, "--criterion 'luck'"),
        ({"steps": "3", "batch": "1"}, "the arm warm is to see 1.5 rows"),
        ({"ngram": "2"}, "--ngram 2 applies to no arm"),
        ({"horizon": "40"}, "arm sft: --horizon 40"),
        ({"eval_horizons": "64"}, "--eval-horizons 64 does not fit"),
        ({"eval_rows": "0"}, "--eval-rows 0"),
        ({"answer_tokens": "4"}, "--answer-tokens is for data with prompts and answers"),
    ],
)
def test_mistakes_leave_nothing(tiny_folder, tiny_text, tmp_path, changes, message):
    result = invoke(command(tiny_text, tiny_folder, tmp_path / "out", **changes))
    assert isinstance(result.exception, UsageError), result.output
    assert message in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_about_answers(tiny_folder, tmp_path):
    argv = command(write_problems(tmp_path / "mine.jsonl"), tiny_folder, tmp_path / "out", answer_tokens=0)
    result = invoke(argv)
    assert isinstance(result.exception, UsageError), result.output
    assert "--answer-tokens 0" in str(result.exception)  # which `evaluate` calls --max-new-tokens
    assert not (tmp_path / "out").exists()


def test_data_that_is_not_there(tiny_folder, tmp_path):
    result = invoke(command("no/where.jsonl", tiny_folder, tmp_path / "out"))
    assert isinstance(result.exception, UsageError)
    assert "no/where.jsonl" in str(result.exception)
    assert list(tmp_path.iterdir()) == []
