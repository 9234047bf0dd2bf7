"""The main job on the real models, at reduced size, through the command line; and its policy in plain transformers."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PLAIN = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
text = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]))(
    "def main():", max_new_tokens=8, do_sample=False)[0]["generated_text"]
assert "ebft" not in sys.modules
print(len(text))
"""


@pytest.mark.assets
def test_run_command_on_the_real_models(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "cli.py", "run", "--features", "sbert", "--sampler", "strided", "--out", str(out)]
    small = ["--steps", "2", "--held-out", "2", "--length", "48", "--batch", "2"]
    done = subprocess.run([*command, *small], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr

    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2"]
    evaluation = json.loads((out / "evaluation.json").read_text())["metrics"]
    assert 1 < evaluation["cross_entropy"]["before"] < 5  # a language model on code, not noise: ln 49152 = 10.8
    assert 0 < evaluation["feature_matching_loss"]["before"] < 2
    assert evaluation["kl"]["before"] == 0
    assert "feature matching loss" in done.stdout

    plain = subprocess.run(
        [sys.executable, "-c", PLAIN, str(out / "policy")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert plain.returncode == 0, plain.stderr
    assert int(plain.stdout.split()[-1]) > len("def main():")


def test_the_readme_pipeline_runs(tiny_folder, tiny_text, capsys):
    """The code block of the README, word for word but for the model and the text."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    for name, ours in (("smollm2-135m", tiny_folder), ("stdlib", tiny_text)):
        assert f'"{name}"' in code
        code = code.replace(f'"{name}"', repr(str(ours)))
    exec(compile(code, "README.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2", "3"]


def test_the_example_trains_on_a_tiny_model(tiny_folder, tiny_text):
    from examples.custom_pipeline import main

    records = main(str(tiny_folder), steps=2, data=str(tiny_text))
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["gradient_norm"] > 0 for record in records)
