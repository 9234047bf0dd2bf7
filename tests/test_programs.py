"""Programs out of answers: alone, behind their prompts, and out of the fences in which chat models write them."""

import pytest

from ebft.assemble.evaluation import _prompts
from ebft.assemble.rows import Data
from ebft.assemble.study_arms import TASKS, shared_options
from ebft.assemble.study_budget import read_budget
from ebft.commands.derived import evaluate_defaults, run_defaults
from ebft.data import Example
from ebft.loops.evaluation.prompts import PASS, answer_totals
from ebft.loops.evaluation.quantities import Quantity
from ebft.objectives.programs import programs, unfenced
from ebft.policy import CausalPolicy

PROMPT = "def f(x):\n    '''Add 1.'''\n"
BODY = "    return x + 1\n"
WHOLE = "def f(x):\n    return x + 1"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (f"```python\n{WHOLE}\n```", WHOLE),
        (f"Here it is:\n\n```\n{WHOLE}\n```\nIt adds 1.", WHOLE),
        (f"```py\n{WHOLE}\n```\nor\n```python\nelse\n```", WHOLE),
        (f"```bash\npip install f\n```\n\n``` Python title=f.py\n{WHOLE}\n```", WHOLE),
        (f"1. So:\n   ```python\n   {WHOLE.replace(chr(10), chr(10) + '   ')}\n   ```\n", WHOLE),
        (f"````python\n{WHOLE}\n# ```\n```\n````\n", f"{WHOLE}\n# ```\n```"),
        (f"```python\n{WHOLE}", WHOLE),  # cut off
        ("```python", ""),
        ("```bash\npip install f", "```bash\npip install f"),
        ("```js\nf()\n```\nand then nothing", "```js\nf()\n```\nand then nothing"),
        ("Call ```f(1)``` or ``` g ```\nthen stop", "Call ```f(1)``` or ``` g ```\nthen stop"),
        ("```f(1)```\n", "```f(1)```\n"),
        (BODY, BODY),
        ("", ""),
    ],
)
def test_the_first_fence_of_python(text, code):
    assert unfenced(text) == code


def test_answers_are_taken_out_of_fences_where_asked_to():
    answers = [BODY, f"Sure!\n```python\n{WHOLE}\n```\nDone.", f"```\n{BODY}```", f"```python\n{WHOLE}"]
    prompts, right = [PROMPT] * 4, [BODY] * 4
    assert programs(answers, prompts, right) == [PROMPT + answer for answer in answers]
    expected = [PROMPT + BODY, PROMPT + WHOLE, PROMPT + BODY.rstrip("\n"), PROMPT + WHOLE]
    assert programs(answers, prompts, right, fenced=True) == expected
    assert programs(answers[1:2], ["Add 1."], [WHOLE], fenced=True) == [WHOLE]
    assert programs(answers[1:2], prompts[:1], right[:1], together=False, fenced=True) == [WHOLE]
    for start in (PROMPT, PROMPT.rstrip("\n")):  # lines of a fence begin on one of their own
        assert programs(answers[1:2], [start], ["\n" + BODY], fenced=True) == [PROMPT + WHOLE]


def test_what_is_a_program_as_it_is_stays():
    documented = "    '''As in\n\n    ```python\n    f(1)\n    ```\n    '''\n    return x + 1\n"
    assert programs([documented], [PROMPT], [BODY], fenced=True) == [PROMPT + documented]
    assert programs([documented], [PROMPT], [documented]) == [PROMPT + documented]


def test_answers_are_as_the_reference_is():
    """Without being asked: where right answers are in fences, no other one could be a program."""
    right = f"```python\n{WHOLE}\n```"
    assert programs([right, WHOLE], ["Add 1."] * 2, [right] * 2) == [WHOLE, WHOLE]
    assert programs([right, f"```\n{BODY}```"], [PROMPT] * 2, [right] * 2) == [PROMPT + WHOLE, PROMPT + BODY.rstrip()]
    prose = "It cannot be done."
    assert programs([right], [PROMPT], [prose]) == [right]


def test_scoring_of_chat_models():
    problem = Example("0", PROMPT, BODY, ("assert f(1) == 2",))
    texts = [[f"```python\n{WHOLE}\n```", f"```python\n{WHOLE}", "```python\ndef f(x):\n    return x\n```", BODY]]
    for fenced, passed in ((True, 3 / 4), (False, 1 / 4)):
        found = answer_totals(texts, [problem], ks=[1], fenced=fenced, timeout=20)
        assert found[Quantity(PASS, at=1)][0].tolist() == [passed]


def test_chat_says_so(tiny_folder):
    policy = CausalPolicy.from_pretrained(str(tiny_folder), device="cpu", dtype="float32")
    policy.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    data = Data([], [Example("0", PROMPT, BODY, ("assert f(1) == 2",))], answers=True)
    for chat in (True, False):
        made = _prompts(data, policy, {**evaluate_defaults(), "chat": chat})
        assert made.settings["fenced"] is chat


def test_a_study_of_a_chat_model_reads_answers_to_their_end():
    budget = read_budget("small", "qa-code")
    for flags, stop in (({}, 5), ({"chat": True}, None), ({"chat": True, "stop": ["x"]}, 1)):
        found = shared_options(budget, task=TASKS["qa-code"], flags=flags, defaults=run_defaults())["stop"]
        assert (found and len(found)) == stop
