"""Whole runs on a tiny model: the command line's options for one, and what it left."""

import csv
import io
import json

import torch
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from ebft.assemble import build_pipeline, resolve_run, run_from_options, settle
from ebft.commands.derived import run_defaults
from ebft.data import load_documents, pack
from ebft.policy import CausalPolicy

SENTENCE = "def add(left, right):\n    return left + right\n\nfor index in range(10):\n    print(index)\n"


def write_tiny_model(folder):
    """A random Llama of 2 layers with a byte-level BPE tokenizer of about 300 tokens, as a Hugging Face folder."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"], min_frequency=1, show_progress=False
    )
    backend.train_from_iterator([SENTENCE], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_tiny_text(folder):
    """12 small files, about 100 sequences of 32 tokens."""
    for number in range(12):
        lines = [
            f"def f{number}_{line}(x, y={line}):\n    return x * {number + line} + y\n"
            for line in range(number % 5 + 6)
        ]
        (folder / f"module_{number}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder


def write_problems(path, *, count=30):
    """A file of functions to write, each with a test that its own answer passes."""
    lines = [
        {"prompt": f"def f{i}(x):\n", "answer": f"    return x + {i}\n", "tests": [f"assert f{i}(1) == {i + 1}"]}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tiny_options(folder, text):
    """The command line's options with their defaults, but for a tiny run."""
    return run_defaults() | {
        "policy": str(folder), "data": str(text), "device": "cpu", "dtype": "float32", "lora": 0,
        "length": 32, "stride": 9, "first": 5, "horizon": 4, "rollouts": 3, "features": "hidden", "steps": 6,
        "batch": 3, "micro_batch": 2, "kl": 0.1, "lr": 0.01, "held_out": 6, "save_every": 2,
    }  # fmt: skip


def go(options, out, *, resume=False, force=False, explicit=()):
    console = Console(file=io.StringIO())
    run_from_options(options, explicit=set(explicit), out=out, resume=resume, force=force, console=console)
    return console.file.getvalue()


def metrics(out):
    """The rows of metrics.csv without the columns that measure time."""
    with open(out / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if not k.startswith("time_") and k != "tokens_per_second"} for row in rows]


def parts(options, **changes):
    """Policy, pipeline and rows of a run with these options."""
    options = {**options, **changes}
    policy = CausalPolicy.from_pretrained(options["policy"], device="cpu", dtype="float32")
    pipeline = build_pipeline(policy, policy.reference(), settle(options), resolve_run(options))
    rows = pack(load_documents(options["data"]), policy.tokenizer, length=options["length"])
    return policy, pipeline, rows[:8]


def sample(text, *, prefix="The prefix", reward=0.25):
    """A held-out sample as `samples.json` holds it, with one rollout before training and none after."""
    return {"prefix": prefix, "target": text, "before": [{"text": text, "reward": reward}], "after": []}
