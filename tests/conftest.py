"""What the tests of whole runs share: a tiny model in a Hugging Face folder, and a folder of text for it."""

import os
import signal

# The processes of pytest-xdist share the cores: torch, imported below, reads this once.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))

import pytest

from ebft import static_decode
from tests.runs import tiny_options, write_tiny_model, write_tiny_text


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """A name that is no local folder fails at once, here as on a machine without a network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # for subprocesses; this one read it when it started
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session", autouse=True)
def _interruptible():
    """Ctrl-C reaches the tests of it, also where a shell started them in the background and ignores it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _no_picture():
    """Drawing report.png takes longer than all the rest of a tiny run: only the tests of the report draw it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebft.loops.report.curves_png", lambda *args, **kwargs: b"no picture")
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random Llama of 2 layers with a byte-level BPE tokenizer of about 300 tokens, as a Hugging Face folder."""
    return write_tiny_model(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory):
    """A folder of 12 small files, about 100 sequences of 32 tokens."""
    return write_tiny_text(tmp_path_factory.mktemp("tiny-text"))


@pytest.fixture(scope="session")
def options(tiny_folder, tiny_text):
    """The command line's options for a tiny run."""
    return tiny_options(tiny_folder, tiny_text)


@pytest.fixture
def captured(monkeypatch):
    """CUDA graphs as they look from a CPU: steps that can be replayed on the tensors that they were captured with."""
    made = []

    def capture(step, changed):
        before = [x.clone() for x in changed]
        step()
        for x, value in zip(changed, before, strict=True):
            x.copy_(value)
        made.append(step)
        return step

    monkeypatch.setattr(static_decode, "capture", capture)
    return made
