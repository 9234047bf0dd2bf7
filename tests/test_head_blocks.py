"""A head in blocks of its vocabulary, against torch's log-softmax over all of it and autograd through that."""

import pytest
import torch

from ebft import head_blocks
from ebft.head_blocks import FrozenHead, TrainedHead, all_logits
from ebft.tuning import PerDevice

STATES, WIDTH, VOCABULARY, CHOSEN = 7, 6, 23, 3


def operands(dtype=torch.float64, scale=1.0):
    """Hidden [R,H], weight [V,H], tokens [R,Q], among them the first and the last of the vocabulary and of blocks."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(STATES, WIDTH, generator=random, dtype=torch.float64) * scale
    weight = torch.randn(VOCABULARY, WIDTH, generator=random, dtype=torch.float64)
    tokens = torch.randint(VOCABULARY, (STATES, CHOSEN), generator=random)
    tokens[0], tokens[1], tokens[2] = torch.tensor([0, 4, 5]), torch.tensor([22, 20, 19]), 9
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), tokens


def plainly(hidden, weight, tokens, temperature):
    log_probs = (hidden @ weight.T / temperature).log_softmax(-1)
    return log_probs.gather(-1, tokens), -(log_probs.exp() * log_probs).sum(-1)


@pytest.fixture
def handled(monkeypatch):
    """handled(tokens, states): so many of them are handled at once."""

    def set_to(tokens, states=3):
        for name, count in (("TOKENS_PER_BLOCK", tokens), ("STATES_PER_BLOCK", states)):
            monkeypatch.setattr(head_blocks, name, PerDevice(cpu=count, cuda=1))

    return set_to


def pulled(chosen, entropy):
    """A sum whose gradient differs from state to state and from token to token."""
    return sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)).sum() for x in (chosen, entropy))


@pytest.mark.parametrize("block", [1, 5, 23, 1000])
@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("entropy", [True, False])
def test_values_and_gradients(block, rows, temperature, entropy, handled):
    handled(block, rows)
    hidden, weight, tokens = operands()
    wanted = plainly(hidden, weight, tokens, temperature)
    on_hidden, on_weight = torch.autograd.grad(pulled(wanted[0], wanted[1] * entropy), (hidden, weight))
    for head, trained in ((TrainedHead, True), (FrozenHead, False)):
        matrix = weight.detach().requires_grad_(trained)
        found = head.apply(hidden, matrix, tokens, temperature, entropy)
        torch.testing.assert_close(found[0], wanted[0], atol=1e-12, rtol=0)
        if entropy:
            torch.testing.assert_close(found[1], wanted[1], atol=1e-12, rtol=0)
        got = torch.autograd.grad(pulled(found[0], found[1] * entropy), (hidden, matrix) if trained else hidden)
        torch.testing.assert_close(got[0], on_hidden, atol=1e-12, rtol=0)
        if trained:
            torch.testing.assert_close(got[1], on_weight, atol=1e-12, rtol=0)


def test_logits_that_differ_by_thousands(handled):
    """In float32 nothing overflows, and what is said of a token is right to the rounding of its logit."""
    handled(5)
    hidden, weight, tokens = operands(torch.float32, scale=3000)
    exact = [x.double() for x in (hidden, weight)]
    wanted = plainly(*exact, tokens, 1.0)
    largest = float((exact[0] @ exact[1].T).detach().abs().max())
    assert largest > 5000
    for head in (TrainedHead, FrozenHead):
        found = head.apply(hidden, weight.detach().requires_grad_(head is TrainedHead), tokens, 1.0, True)
        for got, value in zip(found, wanted, strict=True):
            torch.testing.assert_close(got.double(), value, atol=largest * 2**-22, rtol=0)
        gradient = torch.autograd.grad(pulled(*found), hidden)[0]
        assert gradient.isfinite().all()


@pytest.mark.parametrize("head", [TrainedHead, FrozenHead])
def test_half_precision_rounds_as_the_products_of_the_whole_vocabulary_do(head, handled):
    """Logits are rounded, sums over blocks are not: values differ by float32's rounding alone."""
    hidden, weight, tokens = operands(torch.float32)
    results = []
    for block in (5, 1000):
        handled(block)
        matrix = weight.detach().bfloat16().requires_grad_(head is TrainedHead)
        found = head.apply(hidden, matrix, tokens, 0.6, True)
        results.append((*found, torch.autograd.grad(pulled(*found), hidden)[0]))
    (chosen, entropy, gradient), whole = results
    assert chosen.dtype == entropy.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(chosen, whole[0], atol=2e-6, rtol=0)
    torch.testing.assert_close(entropy, whole[1], atol=2e-6, rtol=0)
    torch.testing.assert_close(gradient, whole[2], atol=2**-7 * float(whole[2].abs().max()), rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_all_logits(dtype, handled):
    handled(5)
    hidden, weight, _ = (x.detach() for x in operands(dtype))
    found, whole = all_logits(hidden, weight), hidden @ weight.T
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, whole.to(found.dtype), atol=32 * torch.finfo(dtype).eps, rtol=0)


def test_no_larger_tensor_than_a_block_of_logits(handled, monkeypatch):
    """The tallest and widest thing over the vocabulary: so many rows of one block."""
    handled(5)
    seen = []
    inner = head_blocks._logits
    monkeypatch.setattr(head_blocks, "_logits", lambda *given: seen.append(inner(*given)) or seen[-1])
    hidden, weight, tokens = operands()
    found = TrainedHead.apply(hidden, weight, tokens, 1.0, False)
    found[0].sum().backward()
    shapes = {tuple(x.shape) for x in seen}
    assert shapes == {(3, 5), (1, 5), (3, 3), (1, 3)}
    assert len(seen) == 2 * 3 * 5
