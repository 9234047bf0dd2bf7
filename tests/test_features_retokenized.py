"""A backbone with another tokenizer: every string as that backbone alone would read it."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import normalize
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ebft.components.features import FEATURES
from ebft.errors import UsageError
from ebft.features import pooling
from ebft.features.retokenized import retokenized_hidden
from ebft.policy import CausalPolicy
from tests.models import tiny
from tests.runs import go, metrics
from tests.test_features_contract import Batch

LAYERS = (0, 2, 3)


def other_tokenizer(*, bos=True, eos="<end>"):
    """Byte-level BPE of other merges than the policy's, with a token at the start of every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<start>", *([eos] if eos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    backend.train_from_iterator(["ex: the left hand and the right one return in order\n" * 3], trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<start> $A", special_tokens=[("<start>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<start>", eos_token=eos)


@pytest.fixture(scope="module")
def decoder(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture(scope="module")
def backbone():
    return CausalPolicy(tiny(vocab_size=290), other_tokenizer())


def make_batch(decoder, seed=0):
    """Ends inside rows and rollouts, padding, a masked anchor, rollouts cut short, rollout 1 equal to its target."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, len(decoder), (2, 24), generator=random)
    tokens[0, 9] = tokens[1, 3] = decoder.eos_token_id
    mask = torch.arange(24) < torch.tensor([24, 15])[:, None]
    anchors = torch.tensor([[1, 6, 18], [5, 11, 24]])
    anchor_mask = torch.tensor([[True] * 3, [True, True, False]])
    place = (anchors[..., None] + torch.arange(5)).clamp(max=23)
    rows = torch.arange(2)[:, None, None]
    rollouts = torch.randint(1, len(decoder), (2, 3, 4, 5), generator=random)
    own = torch.arange(5) < torch.randint(1, 6, (2, 3, 4, 1), generator=random)
    rollouts[0, 1, 0, 2], own[0, 1, 0] = decoder.eos_token_id, torch.arange(5) < 3
    rollouts[1, 0, 2, 0], own[1, 0, 2] = decoder.eos_token_id, torch.arange(5) < 1
    rollouts[:, :, 1], own[:, :, 1] = tokens[rows, place], mask[rows, place]
    return Batch(tokens, mask, anchors, anchor_mask, rollouts, own, tokens[rows, place], mask[rows, place])


def alone(backbone, decoder, prefix, own, how):
    """One string, written out with its ends, through the backbone's tokenizer and one plain forward of its model."""

    def written(ids):
        return decoder.decode(ids, skip_special_tokens=False).replace("<eos>", "<end>")

    text = written([*prefix, *own])
    coded = backbone.tokenizer(text, return_offsets_mapping=True)
    before = written(prefix)
    while not text.startswith(before):  # bytes of a character that the continuation completes
        before = before[:-1]
    mine = torch.tensor([end > len(before) for _, end in coded.offset_mapping])
    assert mine.any() or own[0] != decoder.eos_token_id
    with backbone.plain() as model:
        states = model(input_ids=torch.tensor([coded.input_ids]), output_hidden_states=True).hidden_states
        # the last of these has gone through the final norm: take what enters it instead
        inputs = {}
        handle = model.model.norm.register_forward_pre_hook(lambda module, args: inputs.update(last=args[0]))
        model(input_ids=torch.tensor([coded.input_ids]))
        handle.remove()
    layers = [inputs["last"][0] if layer == 3 else states[layer][0] for layer in LAYERS]
    joined = torch.cat([normalize(layer, dim=-1) for layer in layers], -1)
    if how == "mean_with_context":
        return joined[1:].mean(0)  # without the token that starts every text
    return pooling.pool(joined, mine, how=how)


@pytest.mark.parametrize("how", pooling.OF_ANY_LENGTH)
@pytest.mark.parametrize("with_documents", [False, True])
def test_features_are_those_of_each_string_alone(backbone, decoder, how, with_documents):
    batch = make_batch(decoder)
    documents = (torch.arange(24) >= 10).long().repeat(2, 1) if with_documents else None
    feature_map = retokenized_hidden(backbone, backbone.tokenizer, decoder, layers=LAYERS, pooling=how)
    rollout, target = batch.embed(feature_map, document_ids=documents)
    assert rollout.shape == (2, 3, 4, target.shape[-1])
    compared = 0
    with torch.no_grad():
        for b, k in batch.anchor_mask.nonzero().tolist():
            anchor = int(batch.anchors[b, k])
            start = 10 if with_documents and anchor > 10 else 0
            prefix = batch.tokens[b, start:anchor].tolist()
            lines = [*zip(batch.rollout_tokens[b, k], batch.rollout_mask[b, k], rollout[b, k], strict=True)]
            lines.append((batch.target_tokens[b, k], batch.target_mask[b, k], target[b, k]))
            for ids, keep, found in lines:
                want = alone(backbone, decoder, prefix, ids[keep].tolist(), how)
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
                compared += 1
    assert compared == 5 * 5
    assert not rollout[1, 2].any()
    assert torch.equal(rollout[:, :, 1], target)


def test_padding_order_and_batch_change_nothing(backbone, decoder):
    batch = make_batch(decoder)
    feature_map = retokenized_hidden(backbone, backbone.tokenizer, decoder)
    rollout, target = batch.embed(feature_map)
    other = make_batch(decoder)
    noise = torch.randint(1, 200, (2, 3, 4, 5), generator=torch.Generator().manual_seed(3))
    other.tokens = torch.where(batch.mask, batch.tokens, 7)
    other.rollout_tokens = torch.where(batch.own_rollouts, batch.rollout_tokens, noise)
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(other.embed(feature_map), (rollout, target), **close)
    for b in (1, 0):
        part = batch.map(lambda x, b=b: x[b : b + 1]).embed(feature_map)
        torch.testing.assert_close(part, (rollout[b : b + 1], target[b : b + 1]), **close)
    batch.anchor_mask = torch.zeros_like(batch.anchor_mask)
    for features in batch.embed(feature_map):
        assert features.shape[-1] == rollout.shape[-1]
        assert not features.any()


def test_an_end_counts_and_a_character_over_the_border_is_the_continuations(backbone, decoder):
    """A rollout that ends at once is one EOS of the backbone; half a character before the anchor goes with the rest."""
    from ebft.features.retokenized import _encoder

    encode = _encoder(backbone.tokenizer, decoder)
    a, end = decoder.encode("a")[0], decoder.eos_token_id
    row = encode([a], [end])
    assert row.tokens == (0, *backbone.tokenizer.encode("a", add_special_tokens=False), 1)
    assert row.own == (False, False, True)
    assert row.text == (False, True, True)
    first, *rest = decoder.encode("é")
    assert rest
    row = encode([a, first], rest)
    assert row.tokens == (0, *backbone.tokenizer.encode("aé", add_special_tokens=False))
    assert row.own == (False, False, True, True)  # both bytes of the character
    assert encode([a, end], [a]).tokens[-2:] == (1, row.tokens[1])


def test_each_distinct_string_is_embedded_once(backbone, decoder, monkeypatch):
    batch = make_batch(decoder)
    batch.rollout_tokens[:], batch.rollout_mask[:] = batch.target_tokens[:, :, None], batch.target_mask[:, :, None]
    rows, embed = [], backbone.hidden_states

    def counted(tokens, *rest, **options):
        rows.append(len(tokens))
        return embed(tokens, *rest, **options)

    monkeypatch.setattr(backbone, "hidden_states", counted)
    batch.embed(retokenized_hidden(backbone, backbone.tokenizer, decoder))
    assert sum(rows) == int(batch.anchor_mask.sum())


@pytest.mark.parametrize(
    ("how", "tokenizer", "decode_with", "message"),
    [
        ("none", other_tokenizer, None, "pooling='none' does not fit a backbone with another tokenizer"),
        ("concat_all", other_tokenizer, None, "pooling='concat_all' does not fit"),
        ("max", other_tokenizer, None, "pooling='max' is unknown"),
        ("last", lambda: other_tokenizer(eos=None), None, "has no EOS token"),
        ("last", object, None, "does not tell which characters"),
        ("last", other_tokenizer, object(), "cannot decode"),
    ],
)
def test_what_cannot_work_is_refused(backbone, decoder, how, tokenizer, decode_with, message):
    with pytest.raises(UsageError, match=message):
        retokenized_hidden(backbone, tokenizer(), decode_with or decoder, pooling=how)


# ---- in a run


@pytest.fixture(scope="module")
def other_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    tokenizer = other_tokenizer()
    tiny(vocab_size=len(tokenizer), num_hidden_layers=4).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_run_says_which_of_the_two_happens(options, other_folder, tmp_path):
    short = options | {"steps": 1, "held_out": 2}
    said = go(short | {"backbone": str(other_folder)}, tmp_path / "other")
    assert "has another vocabulary than the policy: text is re-tokenised" in said
    assert said.index("re-tokenised") < said.index("training and")
    assert len(metrics(tmp_path / "other")) == 1
    said = go(short | {"backbone": short["policy"]}, tmp_path / "same")
    assert "token ids are passed on" in said
    assert "re-tokenised" not in said
    said = go(short | {"features": "join:hidden+ngram"}, tmp_path / "joined")
    assert "token ids are passed on to the backbone start" in said
    assert "2-grams of tokens" in said


def test_poolings_per_token_are_refused_before_anything_is_written(options, other_folder, tmp_path):
    chosen = {"backbone": str(other_folder), "pooling": "none", "credit": "total"}
    with pytest.raises(UsageError, match="does not fit a backbone with another tokenizer"):
        go(options | chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_layers_are_counted_in_the_backbone(decoder, other_folder):
    policy = CausalPolicy(tiny(), decoder)
    build = FEATURES["hidden"].build
    chosen = {"backbone": str(other_folder), "unit_norm": "layer", "pooling": "last"}
    build(policy, policy, layers="4", **chosen)
    with pytest.raises(UsageError, match="layer 5 is out of range"):
        build(policy, policy, layers="5", **chosen)
