"""How much is handled at once changes how long it takes; results change by rounding alone."""

import pytest
import torch

from ebft import head_blocks, static_decode
from ebft.attention import chunks, decode, static
from ebft.policy import HEAD_ROWS, CausalPolicy
from ebft.tuning import PerDevice
from tests.models import tiny

PARTS = {
    "chunked, anchors": (chunks, "ANCHORS_PER_CALL"),
    "chunked, tokens": (chunks, "TOKENS_PER_CALL"),
    "chunked, rows": (chunks, "ROWS_PER_CALL"),
    "steps, columns": (decode, "COLUMNS_PER_CALL"),
    "static steps, columns": (static, "COLUMNS_PER_CALL"),
    "tokens of the vocabulary": (head_blocks, "TOKENS_PER_BLOCK"),
    "states of a head": (head_blocks, "STATES_PER_BLOCK"),
}


def test_each_device_has_its_own():
    few = PerDevice(cpu=3, cuda=7)
    assert [few.on(torch.device(name)) for name in ("cpu", "cuda", "cuda:1")] == [3, 7, 7]
    assert CausalPolicy(tiny()).head_rows == HEAD_ROWS.cpu
    assert CausalPolicy(tiny(), head_rows=5).head_rows == 5
    for module, name in PARTS.values():
        few = getattr(module, name)
        assert few.cpu < few.cuda or (name == "STATES_PER_BLOCK" and few.cpu == few.cuda)


def outcome(name):
    """What sampling in steps of both kinds draws, scoring finds, and the gradient of it."""
    policy = CausalPolicy(tiny(name), kernel="chunked")
    tokens = torch.arange(2 * 40).view(2, 40) % 23 + 3
    anchors = torch.tensor([[4, 9, 20, 31, 12], [7, 8, 30, 2, 36]])
    comb = tokens, tokens > 0, anchors, anchors > 0
    how = {"rollouts": 3, "horizon": 4, "seed": 5, "eos": 2}
    drawn = policy.sample(*comb, **how)
    policy.static = static_decode.StaticDecoder(policy, "graph")
    again = policy.sample(*comb, **how)
    scores = policy.score(*comb, drawn[0], drawn[2], entropy=True)
    loss = sum((x * torch.linspace(-1, 1, x.numel()).view_as(x)).sum() for x in scores)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    return [*drawn, *again], [x.detach() for x in scores], torch.autograd.grad(loss, parameters)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_results_do_not_depend_on_how_much_is_handled_at_once(name, captured, monkeypatch):
    usual, asked = outcome(name), set()

    class Few(PerDevice):
        def on(self, device):
            asked.add(self.cuda)  # by which it is told from the others
            return super().on(device)

    for size in (1, 3, 1 << 20):
        for number, (module, constant) in enumerate(PARTS.values()):
            monkeypatch.setattr(module, constant, Few(size, number))
        drawn, scores, gradients = outcome(name)
        for ours, theirs in zip(drawn + scores, usual[0] + usual[1], strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
        for ours, theirs in zip(gradients, usual[2], strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5 * float(theirs.abs().max() + 1), rtol=0)
    # a head that caps its logits is not taken in blocks, of tokens or of states
    assert len(asked) == len(PARTS) - 2 * (name == "gemma2")
