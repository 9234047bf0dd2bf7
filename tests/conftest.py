"""What the tests of whole runs share: a tiny model in a Hugging Face folder, and a folder of text for it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SENTENCE = "def add(left, right):\n    return left + right\n\nfor index in range(10):\n    print(index)\n"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A name that is no local folder fails at once, here as on a machine without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for subprocesses; this one read it when it started
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Llama of 2 layers with a byte-level BPE tokenizer of about 300 tokens, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("tiny-llama")
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


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A folder of 12 small files, about 100 sequences of 32 tokens."""
    folder = tmp_path_factory.mktemp("tiny-text")
    for number in range(12):
        lines = [
            f"def f{number}_{line}(x, y={line}):\n    return x * {number + line} + y\n"
            for line in range(number % 5 + 6)
        ]
        (folder / f"module_{number}.py").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def options(tiny_folder, tiny_text):
    """The command line's options for a tiny run."""
    from tests.runs import tiny_options

    return tiny_options(tiny_folder, tiny_text)
