"""The sampler that asks a vLLM server, against a small server that speaks its protocol and holds a tiny model."""

import json
import shutil
import threading
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import groupby

import pytest
import torch
from transformers import AutoModelForCausalLM

from ebft.draw import inverse_cdf, sampling_log_probs
from ebft.errors import UsageError
from ebft.policy import CausalPolicy
from ebft.samplers import full
from ebft.samplers.vllm import Server, put_weights, sample
from examples import vllm_rollouts
from tests.models import tiny

EOS, OTHER_EOS = 1, 7
# What the server takes where a request says nothing: the model's generation_config.json, which names two ends.
GENERATION_CONFIG = {"top_k": 2, "min_p": 0.5, "repetition_penalty": 3.0, "temperature": 0.3, "top_p": 0.5}


class Fake(ThreadingHTTPServer):
    """Draws greedily or with the request's seed, one plain forward pass a token, from the model of `load`."""

    def __init__(self, load):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.load, self.model, self.seen, self.cache, self.broken = load, load(), [], {}, None
        self.lock = threading.Lock()

    def complete(self, body):
        with self.lock:
            key = tuple(body["prompt"])
            # as a prefix cache does it: what was computed once is taken for granted
            start = self.cache.setdefault(key, self.log_probs(list(key)))
            generator, drawn = torch.Generator().manual_seed(body["seed"]), []
            used = {**GENERATION_CONFIG, **{name: value for name, value in body.items() if value is not None}}
            ends = set(body.get("stop_token_ids") or [])
            if not body.get("ignore_eos"):
                ends |= {EOS, OTHER_EOS}
            while len(drawn) < body["max_tokens"] and not ends & set(drawn[-1:]):
                log_probs = self.log_probs([*key, *drawn]) if drawn else start
                drawn.append(_draw(log_probs.clone(), [*key, *drawn], used, generator))
            ended = drawn[-1] in ends
            return {
                "choices": [
                    {
                        "token_ids": drawn,
                        "finish_reason": "stop" if ended else "length",
                        "stop_reason": drawn[-1] if ended else None,
                    }
                ]
            }

    @torch.no_grad()
    def log_probs(self, ids):
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)


def _draw(log_probs, seen, used, generator):
    """A token as the server draws it: penalty, temperature, then what its other settings leave."""
    repeated = torch.tensor(sorted(set(seen)))
    log_probs[repeated] *= used["repetition_penalty"]
    settings = {"temperature": used["temperature"], "top_p": used["top_p"], "min_p": used["min_p"]}
    settings["top_k"] = used["top_k"] if used["top_k"] > 0 else None
    uniform = torch.rand(1, generator=generator, dtype=torch.float64)
    return int(inverse_cdf(sampling_log_probs(log_probs, **settings).exp(), uniform))


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body))
        found = None
        if self.server.broken is not None:
            status, found = self.server.broken
        else:
            status = 200
            if self.path == "/v1/completions":
                found = self.server.complete(body)
            elif self.path == "/collective_rpc":
                assert body == {"method": "reload_weights"}
                self.server.model = self.server.load()
            elif self.path == "/reset_prefix_cache":
                self.server.cache.clear()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(b"" if found is None else json.dumps(found).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def policy():
    return CausalPolicy(tiny("llama"))


@contextmanager
def serving(folder):
    """A server of the model in the folder, and where it listens."""
    made = Fake(partial(AutoModelForCausalLM.from_pretrained, folder))
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    try:
        yield made, f"http://127.0.0.1:{made.server_port}/"
    finally:
        made.shutdown()
        made.server_close()
        thread.join()


@pytest.fixture
def fake(policy, tmp_path):
    policy.save_pretrained(tmp_path / "served")
    with serving(tmp_path / "served") as (made, url):
        yield made, Server(url, str(tmp_path / "served"), connections=4)


def batch():
    tokens = torch.arange(30).view(2, 15) % 27 + 2
    anchors, real = torch.tensor([[4, 9], [7, 1]]), torch.tensor([[True, True], [True, False]])
    return tokens, tokens >= 0, anchors, real


OPTIONS = {"rollouts": 3, "horizon": 5, "seed": 7, "eos": EOS}


def test_it_keeps_the_contract_of_samplers(fake, policy):
    made, server = fake
    tokens, mask, anchors, real = batch()
    documents = torch.tensor([[0] * 6 + [1] * 9] * 2)
    drawn, log_prob, alive = sample(server, policy, *batch(), **OPTIONS, temperature=0.8, document_ids=documents)
    assert drawn.shape == log_prob.shape == alive.shape == (2, 2, 3, 5)
    assert (drawn.dtype, log_prob.dtype, alive.dtype) == (torch.int64, torch.float32, torch.bool)
    assert not alive[1, 1].any()
    assert (drawn[~alive] == 0).all()
    assert (log_prob[~alive] == 0).all()
    for row, own in zip(drawn[real].flatten(0, 1), alive[real].flatten(0, 1), strict=True):
        count = int(own.sum())
        assert own[:count].all()
        assert not own[count:].any()
        assert count == 5 or row[count - 1] == EOS  # which counts
    wanted = policy.score(tokens, mask, anchors, real, drawn, alive, temperature=0.8, document_ids=documents)[0]
    torch.testing.assert_close(log_prob, wanted)
    prompts = {tuple(body["prompt"]) for _, body in made.seen}
    contexts = [tokens[0, :4], tokens[0, 6:9], tokens[1, 6:7]]  # inside their documents
    assert prompts == {tuple(context.tolist()) for context in contexts}
    body = made.seen[0][1]
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.8, 1.0, 5)
    assert body["return_token_ids"] is True
    assert (body["stop_token_ids"], body["ignore_eos"]) == ([EOS], True)


def test_greedy_it_draws_what_the_policy_draws(fake, policy):
    _, server = fake
    ours = policy.sample(*batch(), **OPTIONS, temperature=0.0)
    theirs = sample(server, policy, *batch(), **OPTIONS, temperature=0.0)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[2], theirs[2])


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_k": 3}, {"min_p": 0.1, "top_p": 0.9}], ids=str)
def test_it_draws_from_the_distribution_of_the_policy(fake, policy, settings):
    """χ² of first tokens against the policy's own, whatever the model's generation_config.json says."""
    _, server = fake
    tokens, mask, *_ = batch()
    anchors, count = torch.tensor([[4]]), 200
    given = tokens[:1], mask[:1], anchors, anchors > 0
    drawn, log_prob, _ = sample(server, policy, *given, rollouts=count, horizon=1, seed=3, eos=EOS, **settings)
    with torch.no_grad():
        every = torch.arange(29).view(1, 1, -1, 1)
        probability = policy.score(*given, every, every >= 0, **settings)[0].flatten().exp().double()
    observed = drawn.flatten().bincount(minlength=29).double()
    assert not observed[probability == 0].any()
    assert log_prob.isfinite().all()
    kept = probability * count >= 5
    expected = torch.cat([probability[kept], probability[~kept].sum()[None]]) * count
    found = torch.cat([observed[kept], observed[~kept].sum()[None]])
    statistic = ((found - expected) ** 2 / expected.clamp(min=1e-9)).sum()
    degrees = int(kept.sum())
    # the 1 - 1e-5 quantile by Wilson and Hilferty
    assert statistic < degrees * (1 - 2 / (9 * degrees) + 4.265 * (2 / (9 * degrees)) ** 0.5) ** 3


@pytest.mark.parametrize("eos", [EOS, None])
def test_no_other_token_ends_a_rollout(fake, policy, eos):
    _, server = fake
    drawn, _, alive = sample(server, policy, *batch(), rollouts=12, horizon=8, seed=1, eos=eos)
    real = drawn[batch()[3]].flatten(0, 1)
    going_on = (real[:, :-1] == OTHER_EOS) & alive[batch()[3]].flatten(0, 1)[:, 1:]
    assert going_on.any()
    assert eos is not None or alive[batch()[3]].all()


def test_what_is_drawn_depends_on_its_keys_alone(fake, policy):
    made, server = fake
    ids = torch.tensor([11, 12])
    whole, *_ = sample(server, policy, *batch(), **OPTIONS, sequence_ids=ids)
    row = [x[1:] for x in batch()]
    assert torch.equal(sample(server, policy, *row, **OPTIONS, sequence_ids=ids[1:])[0], whole[1:])
    other, *_ = sample(server, policy, *batch(), **{**OPTIONS, "seed": 8}, sequence_ids=ids)
    assert not torch.equal(other, whole)
    seeds = {body["seed"] for _, body in made.seen}
    assert len(seeds) == 9 + 9  # of every rollout, the same for the row alone


def test_whole_answers(fake, policy):
    _, server = fake
    tokens, mask, *_ = batch()
    engine = partial(sample, server, policy)
    drawn, _, alive = full.sample(
        engine, tokens, mask, torch.tensor([5, 8]), rollouts=2, max_new_tokens=6, eos=EOS, seed=0
    )
    assert drawn.shape == (2, 1, 2, 6)
    assert alive[..., 0].all()


def test_new_weights_are_served_and_old_keys_forgotten(fake, policy, tmp_path):
    made, server = fake
    options = {**OPTIONS, "temperature": 0.0}
    before, *_ = sample(server, policy, *batch(), **options)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.copy_(parameter.roll(1, 0))
    changed, *_ = policy.sample(*batch(), **options)
    assert not torch.equal(changed, before)
    put_weights(server, policy, tmp_path / "served")
    assert [path for path, _ in made.seen[-2:]] == ["/collective_rpc", "/reset_prefix_cache"]
    assert torch.equal(sample(server, policy, *batch(), **options)[0], changed)


def test_the_example_trains_on_what_the_server_draws(tiny_folder, tiny_text, tmp_path):
    served = tmp_path / "served"
    shutil.copytree(tiny_folder, served)
    start = AutoModelForCausalLM.from_pretrained(served)
    with serving(served) as (made, url):
        records = vllm_rollouts.main(str(served), url, steps=2, data=str(tiny_text))
        kinds = [path for path, _ in made.seen]
        assert any(not torch.equal(*pair) for pair in zip(start.parameters(), made.model.parameters(), strict=True))
    assert [record["step"] for record in records] == [1, 2]
    assert [kind for kind, _ in groupby(kinds)] == ["/v1/completions", "/collective_rpc", "/reset_prefix_cache"] * 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((404, {"error": "no such model"}), r"refuses /v1/completions \(404\).*no such model"),
        ((200, {"choices": [{"text": "hello", "finish_reason": "stop"}]}), "answered no token ids.*return_token_ids"),
        ((200, {"choices": []}), "answered no token ids"),
        ((200, {"choices": [{"token_ids": [3] * 6, "finish_reason": "length"}]}), "drew 6 tokens.*expected 1 to 5"),
        ((200, {"choices": [{"token_ids": [3], "finish_reason": "abort"}]}), "ended with 'abort'"),
        (
            (200, {"choices": [{"token_ids": [3], "finish_reason": "stop", "stop_reason": 7}]}),
            "stopped at 7 after 1 tokens, and was told to at token 1",
        ),
    ],
    ids=["refused", "text", "nothing", "too much", "aborted", "stopped elsewhere"],
)
def test_what_goes_wrong_is_said(fake, policy, answer, message):
    made, server = fake
    made.broken = answer
    with pytest.raises(UsageError, match=message):
        sample(server, policy, *batch(), **OPTIONS)


def test_an_end_that_the_server_leaves_out_is_put_back(fake, policy):
    made, server = fake
    made.broken = 200, {"choices": [{"token_ids": [3], "finish_reason": "stop"}]}
    drawn, _, alive = sample(server, policy, *batch(), **OPTIONS)
    assert drawn[0, 0, 0].tolist() == [3, EOS, 0, 0, 0]
    assert alive[0, 0, 0].tolist() == [True, True, False, False, False]


def test_a_server_that_stops_untold_is_said(fake, policy):
    made, server = fake
    made.broken = 200, {"choices": [{"token_ids": [3], "finish_reason": "stop"}]}
    with pytest.raises(UsageError, match="stopped at None after 1 tokens, and was told to at no token"):
        sample(server, policy, *batch(), **{**OPTIONS, "eos": None})


def test_a_server_that_is_not_there_is_said(policy):
    with pytest.raises(UsageError, match=r"http://127.0.0.1:9 does not answer.*vllm serve folder"):
        sample(Server("http://127.0.0.1:9", "folder", timeout=2.0), policy, *batch(), **OPTIONS)
