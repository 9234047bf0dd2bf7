"""What `plan` predicts: memory against the tensors that are alive in the real stages, and its parts by hand."""

import copy
import io
import json
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

from ebft.assemble import plan_from_options
from ebft.errors import UsageError
from ebft.loading import add_adapters
from ebft.planning.live import live_bytes
from ebft.planning.memory import Kind, Work, logits_at_once, measure_rates, sampling_bytes, scoring_bytes
from ebft.planning.plan import count_weights, state_bytes
from ebft.planning.products import multiply
from ebft.planning.speed import Device, stage_seconds, update_seconds
from ebft.policy import CausalPolicy

VOCABULARY, LAYERS = 2000, 5
LLAMA = {
    **{"hidden_size": 96, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"tie_word_embeddings": True, "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS},
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 96, "n_layer": LAYERS, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1}
FULL = Kind(torch.float32)
CASES = {
    "all weights": ("llama", LLAMA, FULL),
    "adapters": ("llama", LLAMA, Kind(torch.float32, lora=4)),
    "recomputed": ("llama", LLAMA, Kind(torch.float32, checkpointing=True)),
    "bfloat16 compute": ("llama", LLAMA, Kind(torch.float32, torch.bfloat16)),
    "gpt2": ("gpt2", GPT2, FULL),
}


def test_live_bytes_by_hand():
    size = 4 * 1000

    def chain():
        x = torch.zeros(1000)
        y = x + 1  # two
        del x
        z = y.view(10, 100) * 2  # y and z
        del y, z
        torch.zeros(1000)  # one

    def kept_for_backward():
        x = torch.zeros(1000, requires_grad=True)
        y = x.exp().exp()  # the graph keeps both results, with x three
        del x
        assert y.requires_grad

    assert live_bytes(chain) == 2 * size
    assert live_bytes(kept_for_backward) == 3 * size
    assert live_bytes(lambda: torch.zeros(1000).add_(1).view(-1)) == size


@pytest.mark.parametrize("name", CASES)
def test_predicted_memory_of_the_stages_is_that_of_their_tensors(name):
    """Scoring, which is the peak of a run, within 10 %; sampling within 40 % and embedding within 70 %, above."""
    architecture, options, kind = CASES[name]
    config = AutoConfig.for_model(architecture, **options)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    if kind.lora:
        model = add_adapters(model, rank=kind.lora, seed=0)
    policy = CausalPolicy(model, autocast=kind.autocast, checkpointing=kind.checkpointing)
    work = Work(rows=3, length=160, count=18, rollouts=4, horizon=8)
    tokens = torch.arange(work.trunk).view(3, -1) % VOCABULARY
    anchors = torch.linspace(1, 152, 18).long().expand(3, -1)
    given = tokens, tokens >= 0, anchors, anchors > 0
    drawn = torch.ones(3, 18, 4, 8, dtype=torch.int64)
    for parameter in policy.trainable().values():
        parameter.grad = torch.zeros_like(parameter)

    def score():
        (log_prob, own) = policy.score(*given, drawn, drawn > 0)
        (log_prob.sum() + own.sum()).backward()

    true = {
        "sample": live_bytes(lambda: policy.sample(*given, rollouts=4, horizon=8, seed=0)),
        "embed": live_bytes(lambda: policy.hidden_states(*given, drawn, drawn > 0, layers=[LAYERS])),
        "score": live_bytes(score),
    }
    rates = measure_rates(config, kind)
    logits = logits_at_once(config, policy.head_rows, policy.device)
    predicted = {
        "sample": sampling_bytes(config, kind, rates["embed"], work, head_rows=policy.head_rows),
        "embed": rates["embed"].at(LAYERS, work.trunk, work.teeth("embed")),
        "score": scoring_bytes(config, kind, rates["score"], work, logits=logits),
    }
    ratios = {stage: predicted[stage] / true[stage] for stage in true}
    assert 0.9 < ratios["score"] < 1.1, ratios
    assert 0.7 < ratios["sample"] < 1.4, ratios
    assert 0.9 < ratios["embed"] < 1.7, ratios


def test_flex_is_planned_for_where_it_has_no_gradient():
    config = AutoConfig.for_model("llama", **LLAMA)
    assert measure_rates(config, Kind(torch.float32, kernel="flex")) == measure_rates(config, FULL)


def test_weights_and_optimizer_states_by_hand():
    config = AutoConfig.for_model("llama", **LLAMA)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert count_weights(config, FULL) == (sum(p.numel() for p in model.parameters()),) * 2
    adapted = add_adapters(model, rank=4, seed=0)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert count_weights(config, Kind(torch.float32, lora=4)) == (count_weights(config, FULL)[0], trained)
    assert state_bytes(torch.optim.AdamW) == 8
    assert state_bytes(lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9)) == 4
    assert state_bytes(torch.optim.SGD) == 0


def test_times_are_those_of_the_products_that_the_stages_do(monkeypatch):
    """With a clock that counts multiplications: T + K·N·(G-1) rows to sample and to score, times 3 with backward."""
    counted = []
    monkeypatch.setattr(Device, "seconds", lambda self, run: counted[-1])

    def products(self, weights, rows, *, backward=False):
        passes = 1 + (1 + any(w.requires_grad for w in weights)) * backward
        return rows * passes * sum(w.numel() for w in weights)

    monkeypatch.setattr(Device, "products", products)
    layer, head = [torch.zeros(2, 3, requires_grad=True)], torch.zeros(5, 3, requires_grad=True)
    work = Work(rows=2, length=10, count=3, rollouts=4, horizon=5)
    parts = {
        **{"layers": 7, "embedder": [layer[0][:1]], "embedded": 3},
        **{"sampled": work, "scored": work, "device": Device(torch.device("cpu"))},
    }
    found = stage_seconds(layer, head, kind=FULL, parts=2, reference=True, **parts)
    body, teeth = 7 * 6, 2 * 3 * 4
    assert found["sample"] == body * (20 + 4 * teeth) + 15 * (6 + 4 * teeth)
    assert found["embed"] == 3 * 3 * (20 + 5 * teeth)
    read = 20 + 4 * teeth + 6
    assert found["score"] == 2 * 2 * (body * (20 + 4 * teeth) + 15 * read)  # the policy's and the reference's
    assert found["update"] == 2 * (2 * body * (20 + 4 * teeth) + 3 * 15 * read)
    alone = stage_seconds(layer, head, kind=FULL, parts=1, reference=False, **{**parts, "sampled": None})
    assert alone == {"score": body * 20 + 15 * 20, "update": 2 * body * 20 + 3 * 15 * 20}
    frozen = [weight.detach() for weight in (*layer, head)]
    adapted = stage_seconds(
        frozen[:1], frozen[1], kind=Kind(torch.float32, lora=1), parts=1, reference=False, **{**parts, "sampled": None}
    )
    assert adapted == {"score": body * 20 + 2 * 15 * 20, "update": body * 20}


def test_products_are_timed_in_proportion():
    device, done = Device(torch.device("cpu")), []

    def counting(products, operands, *, backward):
        done.append(sum(rows for _, rows in products))
        multiply(products, operands, backward=backward)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ebft.planning.speed.multiply", counting)
        patch.setattr("ebft.planning.speed._OPERATIONS", {"cpu": 2 * 64 * 64 * 10})
        patch.setattr(Device, "seconds", lambda self, run: run() or 1.0)
        assert device.products([torch.zeros(64, 64)], 5) == 1.0
        assert device.products([torch.zeros(64, 64)], 40) == 4.0
        assert done == [5, 10]
        assert device.products([torch.zeros(64, 64)], 0) == 0
    assert update_seconds(torch.optim.AdamW, 640, device) > 0


def test_the_command_prints_a_plan(options):
    console = Console(file=io.StringIO(), width=100)
    chosen = {**options, "features": "hidden", "kl": 0.1, "ema": 0.9, "held_out": 2}
    plan = plan_from_options(chosen, processes=1, console=console)
    said = console.file.getvalue()
    for words in (
        "weights",
        "frozen copy",
        "gradients",
        "optimizer",
        "average",
        "score adds",
        "peak",
        "step",
        "tokens/s",
    ):
        assert words in said
    assert plan.parts["optimizer"] == 2 * plan.parts["gradients"] == 2 * plan.parts["weights"]
    assert plan.peak == sum(plan.parts.values()) + max(plan.stages.values())
    halved = plan_from_options({**chosen, "batch": 6}, processes=2, console=console)
    assert halved.stages["score"] == pytest.approx(plan.stages["score"])
    assert halved.tokens == plan.tokens
    adapters = plan_from_options({**chosen, "lora": 2}, processes=1, console=console)
    assert adapters.parts["frozen copy"] == 0
    assert adapters.parts["optimizer"] < plan.parts["optimizer"] / 2


def test_a_backbone_is_planned_by_its_own_architecture(options, tmp_path):
    """One of twice the layers and width, of which the last runs: four times the layers of a half of the policy's."""
    folder = tmp_path / "backbone"
    shutil.copytree(options["policy"], folder)
    config = json.loads((folder / "config.json").read_text())
    larger = {"num_hidden_layers": 4, "hidden_size": 64, "vocab_size": config["vocab_size"] + 1, "layer_types": None}
    (folder / "config.json").write_text(json.dumps({**config, **larger}))
    console = Console(file=io.StringIO(), width=100)
    chosen = {**options, "features": "hidden", "dtype": "float32"}
    own, other = (
        plan_from_options({**chosen, "backbone": name, "layers": layers}, processes=1, console=console)
        for name, layers in ((options["policy"], "2"), (str(folder), "4"))
    )
    assert other.parts["feature backbone"] > own.parts["feature backbone"]
    assert other.stages["embed"] > 1.5 * own.stages["embed"]
    assert other.stages["score"] == own.stages["score"]
    assert f"--backbone {folder} has another vocabulary" in " ".join(console.file.getvalue().split())
    with pytest.raises(UsageError, match="4"):
        plan_from_options({**chosen, "layers": "4"}, processes=1, console=console)


def test_processes_that_share_hold_less(options):
    """Of a tiny model by hand: 2 layers of 32 x 32, 2 of 16 x 32, 3 of 48 x 32 and 2 norms; 4 processes."""
    chosen = {**options, "features": "hidden", "kl": 0.1, "batch": 12}
    console = Console(file=io.StringIO(), width=100)
    apart, shared = (
        plan_from_options({**chosen, "shard": shard}, processes=4, console=console) for shard in (False, True)
    )
    vocabulary = AutoConfig.from_pretrained(options["policy"]).vocab_size
    layer = 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32)
    rest = 4 * (vocabulary * 32 + 32)
    held = {name: size for name, size in apart.parts.items() if name not in ("process", "feature backbone")}
    assert held["weights"] == held["frozen copy"] == 2 * layer + rest
    assert {name: 4 * shared.parts[name] for name in held} == held
    assert shared.stages["sample"] - apart.stages["sample"] == pytest.approx(2 * layer + rest)
    assert shared.stages["embed"] - apart.stages["embed"] == pytest.approx(2 * layer + rest)
    assert shared.stages["score"] - apart.stages["score"] == pytest.approx(rest + 2 * layer + 2 * layer)  # backward
    assert 4 * shared.stages["update"] == pytest.approx(apart.stages["update"])
    assert "weights shared" in console.file.getvalue()
    alone = plan_from_options({**chosen, "shard": True}, processes=1, console=console)
    assert alone.parts["weights"] == apart.parts["weights"]


@pytest.mark.parametrize(
    ("chosen", "processes", "message"),
    [
        ({}, 0, "--processes 0: expected a whole number >= 1"),
        ({"attention": "dense"}, 1, "--attention dense: its memory is not planned for"),
        ({"method": "mixed"}, 1, "--method mixed: whole answers are not planned for"),
        ({"sampler": "independent"}, 1, "--sampler independent: only strided and random"),
        ({"policy": "nowhere/at-all"}, 1, "policy 'nowhere/at-all': its configuration could not be loaded"),
        ({"horizon": 99}, 1, "--horizon 99 does not fit"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_said(options, chosen, processes, message):
    with pytest.raises(UsageError) as caught:
        plan_from_options({**options, **chosen}, processes=processes, console=Console(file=io.StringIO()))
    assert message in str(caught.value)


def test_a_folder_without_a_model_is_said(options, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({}))
    with pytest.raises(UsageError, match="is a folder that holds no model"):
        plan_from_options({**options, "policy": str(tmp_path)}, processes=1, console=Console(file=io.StringIO()))
