"""What every feature map promises, checked on all of them, and the adapters to and from plain functions."""

import dataclasses

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import one_hot

from ebft import schema
from ebft.errors import UsageError
from ebft.features import as_module, from_text_function, from_token_function
from ebft.features.hidden import hidden
from ebft.features.join import join
from ebft.features.ngram import ngram
from ebft.features.sbert import sbert
from ebft.policy import CausalPolicy
from tests.models import VOCABULARY, tiny


@dataclasses.dataclass
class Batch:
    """The arguments of a feature map, in their order; B=3, T=20, K=3, N=4, G=5."""

    tokens: Tensor
    mask: Tensor
    anchors: Tensor
    anchor_mask: Tensor
    rollout_tokens: Tensor
    rollout_mask: Tensor
    target_tokens: Tensor
    target_mask: Tensor

    @property
    def own_rollouts(self) -> Tensor:
        return self.rollout_mask & self.anchor_mask[..., None, None]

    def embed(self, feature_map, **options):
        fields = [getattr(self, field.name) for field in dataclasses.fields(self)]
        return feature_map(*fields, **options)

    def map(self, function) -> "Batch":
        return Batch(*(function(getattr(self, field.name)) for field in dataclasses.fields(self)))


def make_batch(seed: int = 0) -> Batch:
    """Sequences of 20, 16 and 12 tokens, one masked anchor, rollouts cut short, rollout 1 equal to the target."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(2, VOCABULARY, shape, generator=generator)

    tokens = draw(3, 20)
    mask = torch.arange(20) < torch.tensor([20, 16, 12])[:, None]
    anchors = torch.tensor([[4, 8, 15], [1, 9, 11], [2, 7, 19]])
    anchor_mask = torch.tensor([[True] * 3, [True] * 3, [True, True, False]])
    positions = (anchors[..., None] + torch.arange(5)).clamp(max=19)
    target_tokens = tokens[torch.arange(3)[:, None, None], positions]
    target_mask = mask[torch.arange(3)[:, None, None], positions]
    rollout_tokens = draw(3, 3, 4, 5)
    lengths = torch.randint(1, 6, (3, 3, 4), generator=generator)
    rollout_mask = torch.arange(5) < lengths[..., None]
    rollout_tokens[:, :, 1], rollout_mask[:, :, 1] = target_tokens, target_mask
    return Batch(tokens, mask, anchors, anchor_mask, rollout_tokens, rollout_mask, target_tokens, target_mask)


class Letters:
    """A tokenizer of one letter per token; 0 and 1 are special."""

    def decode(self, ids, *, skip_special_tokens, clean_up_tokenization_spaces):
        assert skip_special_tokens
        assert not clean_up_tokenization_spaces
        return "".join(chr(95 + i) for i in ids if i > 1)


class LetterEncoder:
    """A sentence encoder whose vector is a function of the string alone; records what it is asked."""

    max_seq_length = 30

    def __init__(self):
        self.asked = []

    @torch.inference_mode()
    def encode(self, texts, *, batch_size, convert_to_tensor, show_progress_bar):
        assert convert_to_tensor
        assert not show_progress_bar
        self.asked.append(list(texts))
        rows = []
        for text in texts:
            row = torch.ones(16)
            for i, letter in enumerate(text):
                row[(7 * ord(letter) + i) % 16] += ord(letter) / 100
            rows.append(row)
        return torch.stack(rows)


class ToyBackbone:
    """Hidden states with the interface of a policy: layer l holds (l + 1) · (one-hot of the token, position)."""

    num_layers = 8

    def hidden_states(self, tokens, mask, anchors, anchor_mask, rollouts, rollout_mask, *, layers, document_ids=None):
        self.asked = list(layers)

        def states(ids, positions):
            joined = torch.cat([one_hot(ids, VOCABULARY).float(), positions[..., None].expand(*ids.shape, 1)], -1)
            return {layer: (layer + 1) * joined + 0.1 * layer for layer in layers}

        steps = torch.arange(rollouts.shape[-1])
        teeth = states(rollouts, (anchors[..., None] + steps)[:, :, None].float())
        return teeth, states(tokens, torch.arange(tokens.shape[1]).float())


def ordered_sum(tokens, mask):
    """Features that depend on which token is where."""
    weights = 1.0 + torch.arange(tokens.shape[-1])
    return (one_hot(tokens, VOCABULARY) * weights[:, None] * mask[..., None]).sum(-2)


def text_lengths(texts):
    return torch.tensor([[len(t), sum(map(ord, t)) / 100, 1.0] for t in texts])


MAPS = {
    "token_function": lambda: from_token_function(ordered_sum),
    "token_function_context": lambda: from_token_function(ordered_sum, context_tokens=3),
    "text_function": lambda: from_text_function(text_lengths, Letters()),
    "text_function_context": lambda: from_text_function(text_lengths, Letters(), context_tokens=4),
    "ngram": ngram,
    "ngram_whole": lambda: ngram(5),
    "sbert": lambda: sbert(LetterEncoder(), Letters()),
    "sbert_context": lambda: sbert(LetterEncoder(), Letters(), context_tokens=6),
    "hidden": lambda: hidden(ToyBackbone()),
    "hidden_policy": lambda: hidden(CausalPolicy(tiny()), layers=(1, 3), pooling="mean"),
    "join": lambda: join([ngram(1), sbert(LetterEncoder(), Letters())], [1.0, 3.0]),
}


@pytest.fixture(params=MAPS)
def feature_map(request):
    return MAPS[request.param]()


def close(got, want):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


def test_shapes_dtype_finite_and_zeros_at_masked_anchors(feature_map):
    rollout, target = make_batch().embed(feature_map)
    assert rollout.shape == (3, 3, 4, target.shape[-1])
    assert target.shape[:-1] == (3, 3)
    for x in (rollout, target):
        assert x.dtype == torch.float32
        assert x.isfinite().all()
        assert not x.requires_grad
        assert not x.is_inference()
        assert x[2, 2].abs().max() == 0
        assert x[0].abs().max() > 0


def test_a_rollout_equal_to_its_target_has_the_targets_features(feature_map):
    batch = make_batch()
    rollout, target = batch.embed(feature_map)
    torch.testing.assert_close(rollout[:, :, 1], target, rtol=1e-5, atol=1e-5)
    others = rollout[:, :, [0, 2, 3]] - target[:, :, None]
    assert (others[batch.anchor_mask].abs().amax(-1) > 1e-3).all()


def test_what_is_masked_is_never_read(feature_map):
    batch, other = make_batch(), make_batch()
    noise = torch.randint(2, VOCABULARY, (3, 3, 4, 5), generator=torch.Generator().manual_seed(9))
    other.tokens = torch.where(batch.mask, batch.tokens, noise[:, 0].flatten(1))
    other.rollout_tokens = torch.where(batch.own_rollouts, batch.rollout_tokens, noise)
    own_targets = batch.target_mask & batch.anchor_mask[..., None]
    other.target_tokens = torch.where(own_targets, batch.target_tokens, noise[:, :, 1])
    other.rollout_mask = batch.own_rollouts
    assert not torch.equal(other.rollout_tokens, batch.rollout_tokens)
    close(other.embed(feature_map), batch.embed(feature_map))


def test_batch_composition_and_order_change_nothing(feature_map):
    batch = make_batch()
    whole = batch.embed(feature_map)
    alone = [batch.map(lambda x, b=b: x[b : b + 1]).embed(feature_map) for b in (2, 0, 1)]
    order = torch.tensor([2, 0, 1])
    close([torch.cat(parts) for parts in zip(*alone, strict=True)], [x[order] for x in whole])


def test_order_of_rollouts_and_anchors_changes_nothing(feature_map):
    batch = make_batch()
    rollout, target = batch.embed(feature_map)
    shuffled = dataclasses.replace(
        batch,
        rollout_tokens=batch.rollout_tokens[:, :, [3, 1, 0, 2]],
        rollout_mask=batch.rollout_mask[:, :, [3, 1, 0, 2]],
    )
    close(shuffled.embed(feature_map), (rollout[:, :, [3, 1, 0, 2]], target))


def test_more_padding_changes_nothing(feature_map):
    batch = make_batch()
    padded = make_batch()
    padded.tokens = torch.cat([batch.tokens, torch.full((3, 6), 5)], 1)
    padded.mask = torch.cat([batch.mask, torch.zeros(3, 6, dtype=torch.bool)], 1)
    close(padded.embed(feature_map), batch.embed(feature_map))


@pytest.mark.parametrize("name", sorted(set(MAPS) - {"hidden", "hidden_policy"}))
def test_no_real_anchor_gives_zeros_of_the_right_width(name):
    batch = make_batch()
    width = batch.embed(MAPS[name]())[1].shape[-1]
    batch.anchor_mask = torch.zeros_like(batch.anchor_mask)
    rollout, target = batch.embed(MAPS[name]())
    assert rollout.shape == (3, 3, 4, width)
    assert not rollout.any()
    assert not target.any()


def test_features_can_be_used_in_a_graph():
    """Tensors of inference mode would raise here."""
    rollout, _ = make_batch().embed(sbert(LetterEncoder(), Letters()))
    weight = torch.ones(16, requires_grad=True)
    (rollout @ weight).square().sum().backward()
    assert weight.grad.abs().sum() > 0


# ---- adapters


def seen_tokens(context_tokens, document_ids=None):
    """What a token function gets to see, as lists of own tokens: rollouts [3,3,4], targets [3,3]."""
    calls = []

    def record(tokens, mask):
        calls.append((tokens, mask))
        return torch.zeros(*tokens.shape[:-1], 1)

    make_batch().embed(from_token_function(record, context_tokens=context_tokens), document_ids=document_ids)
    return calls


def test_context_is_the_last_tokens_before_the_anchor():
    batch = make_batch()
    rollouts, targets = seen_tokens(3)
    for (b, k), anchor in [((0, 1), 8), ((1, 0), 1), ((2, 0), 2)]:
        context = batch.tokens[b, max(0, anchor - 3) : anchor].tolist()
        tokens, mask = targets
        assert (
            tokens[b, k][mask[b, k]].tolist() == context + batch.target_tokens[b, k][batch.target_mask[b, k]].tolist()
        )
        tokens, mask = rollouts
        own = batch.rollout_tokens[b, k, 2][batch.rollout_mask[b, k, 2]].tolist()
        assert tokens[b, k, 2][mask[b, k, 2]].tolist() == context + own


def test_context_ends_at_the_border_of_a_document():
    batch = make_batch()
    documents = (torch.arange(20) >= 6).long().expand(3, 20)
    tokens, mask = seen_tokens(4, documents)[1]
    assert tokens[0, 1][mask[0, 1]].tolist() == batch.tokens[0, 6:13].tolist()
    assert tokens[0, 0][mask[0, 0]].tolist() == batch.tokens[0, 0:9].tolist()


def test_the_context_is_of_the_document_it_ends_in_though_its_id_comes_back():
    batch = make_batch()
    documents = torch.tensor([[5] * 4 + [6] * 2 + [5] * 2 + [7] * 12] * 3)  # anchor 8 stands at a border
    tokens, mask = seen_tokens(6, documents)[1]
    assert tokens[0, 1][mask[0, 1]].tolist() == batch.tokens[0, 6:13].tolist()


def test_text_function_gets_each_distinct_string_once():
    batch, calls = make_batch(), []

    def record(texts):
        calls.append(texts)
        return torch.zeros(len(texts), 2)

    batch.rollout_tokens[:], batch.rollout_mask[:] = 7, True
    batch.embed(from_text_function(record, Letters()))
    (texts,) = calls
    assert len(texts) == len(set(texts)) == 1 + 8  # one rollout text, eight real targets
    assert [len(t) for t in texts] == sorted(len(t) for t in texts)


def test_functions_of_the_wrong_shape_are_refused():
    batch = make_batch()
    with pytest.raises(UsageError, match=r"\[3, 3, 4, 5\].*\[3, 3, 4\] and one more axis"):
        batch.embed(from_token_function(lambda tokens, mask: tokens.float().flatten(1)))
    with pytest.raises(UsageError, match=r"expected \[\d+, D\]"):
        batch.embed(from_text_function(lambda texts: torch.zeros(3), Letters()))
    for make in (from_token_function, lambda f, **o: from_text_function(f, Letters(), **o)):
        with pytest.raises(UsageError, match="context_tokens=-1"):
            make(ordered_sum, context_tokens=-1)


@pytest.mark.parametrize("documents", [False, True])
def test_as_module_reads_and_writes_the_schema(documents):
    batch = make_batch()
    entries = dict(
        zip(
            [
                schema.TOKENS,
                schema.MASK,
                schema.ANCHORS,
                schema.ANCHOR_MASK,
                schema.ROLLOUT_TOKENS,
                schema.ROLLOUT_MASK,
                schema.TARGET_TOKENS,
                schema.TARGET_MASK,
            ],
            [getattr(batch, field.name) for field in dataclasses.fields(batch)],
            strict=True,
        )
    )
    td = TensorDict(batch_size=[3])
    for key, value in entries.items():
        td[key] = value
    feature_map = from_token_function(ordered_sum, context_tokens=4)
    module = as_module(feature_map, documents=documents)
    document_ids = None
    if documents:
        with pytest.raises(KeyError, match="document_ids"):
            module(td.copy())
        td[schema.DOCUMENT_IDS] = document_ids = (torch.arange(20) >= 6).long().repeat(3, 1)
    module(td)
    schema.check(td, schema.ROLLOUT_FEATURES, schema.TARGET_FEATURES, *entries)
    rollout, target = batch.embed(feature_map, document_ids=document_ids)
    assert torch.equal(td[schema.ROLLOUT_FEATURES], rollout)
    assert torch.equal(td[schema.TARGET_FEATURES], target)
    with pytest.raises(KeyError, match="anchors"):
        module(td.exclude("anchors"))
