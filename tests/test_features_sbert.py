"""Sentence features: each text as if embedded alone, each distinct text once, targets remembered without a trace."""

import pytest
import torch
from tensordict import TensorDict
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from ebft import assets
from ebft.data.packing import batches
from ebft.errors import UsageError
from ebft.features import from_text_function
from ebft.features.sbert import sbert
from ebft.features.text import continuation_texts
from tests.test_features_contract import LetterEncoder, Letters, make_batch


def texts_of(batch, context_tokens=0, documents=None):
    """The strings, taken apart by hand: rollouts [B][K][N] and targets [B][K], None at masked anchors."""
    letters = Letters()

    def decode(context, ids, mask):
        return letters.decode(
            context + ids[mask].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    rollouts, targets = [], []
    for b in range(3):
        for k in range(3):
            anchor = int(batch.anchors[b, k])
            context = batch.tokens[b, max(0, anchor - context_tokens) : anchor].tolist()
            if documents is not None:
                same = documents[b, max(0, anchor - context_tokens) : anchor] == documents[b, anchor - 1]
                context = [i for i, keep in zip(context, same, strict=True) if keep]
            real = bool(batch.anchor_mask[b, k])
            targets.append(decode(context, batch.target_tokens[b, k], batch.target_mask[b, k]) if real else None)
            for n in range(4):
                own = batch.rollout_tokens[b, k, n], batch.rollout_mask[b, k, n]
                rollouts.append(decode(context, *own) if real else None)
    return rollouts, targets


def one_by_one(encoder, texts):
    options = {"batch_size": 1, "convert_to_tensor": True, "show_progress_bar": False}
    rows = [None if text is None else normalize(encoder.encode([text], **options)[0], dim=0) for text in texts]
    dimension = len(next(row for row in rows if row is not None))
    return torch.stack([torch.zeros(dimension) if row is None else row for row in rows])


@pytest.mark.parametrize("context_tokens", [0, 1, 6, 25])
@pytest.mark.parametrize("with_documents", [False, True])
def test_features_are_those_of_each_string_alone(context_tokens, with_documents):
    batch = make_batch()
    documents = (torch.arange(20) >= 6).long().repeat(3, 1) if with_documents else None
    feature_map = sbert(LetterEncoder(), Letters(), context_tokens=context_tokens)
    rollout, target = batch.embed(feature_map, document_ids=documents)
    rollout_texts, target_texts = texts_of(batch, context_tokens, documents)
    torch.testing.assert_close(rollout.flatten(0, 2), one_by_one(LetterEncoder(), rollout_texts))
    torch.testing.assert_close(target.flatten(0, 1), one_by_one(LetterEncoder(), target_texts))


def test_special_tokens_are_no_text_and_an_empty_continuation_is_one():
    batch = make_batch()
    batch.rollout_tokens[0, 0, 0], batch.rollout_mask[0, 0, 0] = 1, True  # ends at once
    batch.rollout_tokens[0, 0, 2], batch.rollout_mask[0, 0, 2] = torch.tensor([5, 6, 1, 5, 5]), torch.arange(5) < 3
    batch.rollout_tokens[0, 0, 3], batch.rollout_mask[0, 0, 3] = torch.tensor([5, 6, 9, 5, 5]), torch.arange(5) < 2
    rollout, _ = batch.embed(sbert(LetterEncoder(), Letters()))
    torch.testing.assert_close(rollout[0, 0, 0], one_by_one(LetterEncoder(), [""])[0])
    assert torch.equal(rollout[0, 0, 2], rollout[0, 0, 3])
    torch.testing.assert_close(rollout[0, 0].norm(dim=-1), torch.ones(4))


def test_every_distinct_text_is_embedded_once_and_counted():
    batch = make_batch()
    batch.rollout_tokens[:], batch.rollout_mask[:] = 7, True
    batch.rollout_tokens[:, :, 1], batch.rollout_mask[:, :, 1] = batch.target_tokens, batch.target_mask
    encoder = LetterEncoder()
    feature_map = sbert(encoder, Letters())
    batch.embed(feature_map)
    asked = [text for call in encoder.asked for text in call]
    rollouts, targets = texts_of(batch)
    assert sorted(asked) == sorted({text for text in rollouts + targets if text is not None})
    assert feature_map.texts == 8 * 4 + 8
    assert feature_map.distinct == feature_map.encoded == len(asked) == 9


def test_targets_are_embedded_once_across_epochs_and_change_nothing():
    batch, encoder = make_batch(), LetterEncoder()
    feature_map = sbert(encoder, Letters())
    first = batch.embed(feature_map)
    targets = {t for t in texts_of(batch)[1] if t is not None}
    encoder.asked.clear()
    again = batch.embed(feature_map)
    (rollouts,) = encoder.asked
    assert [len(text) for text in rollouts] == sorted(len(text) for text in rollouts)
    assert not targets & {text for call in encoder.asked for text in call}
    assert all(map(torch.equal, first, again))


def test_two_epochs_embed_every_target_text_once():
    """Rows come in another order and other batches in the second epoch; the rollouts are new each time."""
    tokens = torch.randint(2, 29, (6, 20), generator=torch.Generator().manual_seed(0))
    data = TensorDict({"tokens": tokens}, batch_size=[6])
    anchors = torch.tensor([[3, 8, 13]] * 2)
    goals = tokens.unfold(1, 4, 1)[:, [3, 8, 13]]  # [6,3,4]
    written = {"".join(chr(95 + i) for i in ids) for ids in goals.flatten(0, 1).tolist()}
    assert len(written) == 18
    encoder = LetterEncoder()
    feature_map = sbert(encoder, Letters(), cached_texts=18)
    random, yes = torch.Generator().manual_seed(1), torch.ones(2, 3, dtype=torch.bool)
    orders = []
    for step, rows in zip(range(6), batches(data, batch_size=2, seed=0), strict=False):
        if step == 3:
            first_epoch = [text for call in encoder.asked for text in call if text in written]
            encoder.asked.clear()
        goal = rows["tokens"].unfold(1, 4, 1)[:, [3, 8, 13]]
        orders.append(rows["tokens"][:, 0].tolist())
        drawn = torch.randint(2, 29, (2, 3, 4, 4), generator=random)
        everything = torch.ones_like(drawn, dtype=torch.bool)
        feature_map(
            rows["tokens"], rows["tokens"] > 0, anchors, yes, drawn, everything, goal, everything[:, :, 0]
        )  # fmt: skip
    second_epoch = [text for call in encoder.asked for text in call]
    assert orders[:3] != orders[3:]
    assert sorted(first_epoch) == sorted(written)
    assert len(encoder.asked) == 3  # the rollouts of each batch
    assert not written & set(second_epoch)
    assert feature_map._cached == 18


def test_what_is_embedded_together_does_not_depend_on_what_is_remembered():
    """A resumed run starts with nothing remembered: its calls of the encoder must contain the same strings."""

    def calls(*, warm):
        encoder = LetterEncoder()
        feature_map = sbert(encoder, Letters(), cached_texts=20_000 if warm else 0)
        if warm:
            make_batch(1).embed(feature_map)
            part = make_batch()
            part.map(lambda x: x[:1]).embed(feature_map)
            encoder.asked.clear()
        make_batch().embed(feature_map)
        return encoder.asked

    cold, warm = calls(warm=False), calls(warm=True)
    assert len(warm) == len(cold) - 1
    assert all(call in cold for call in warm)


def test_the_number_of_remembered_texts_is_bounded():
    encoder = LetterEncoder()
    feature_map = sbert(encoder, Letters(), cached_texts=7)
    for seed in range(5):
        make_batch(seed).embed(feature_map)
        assert sum(map(len, feature_map._cache.values())) == feature_map._cached <= 7
    encoder.asked.clear()
    for b in (2, 1, 0):  # the first sequence was forgotten
        make_batch(4).map(lambda x, b=b: x[b : b + 1]).embed(feature_map)
    assert len(encoder.asked) == 4  # three times the rollouts, once the targets


def test_the_targets_used_longest_ago_are_forgotten_first():
    batch, encoder = make_batch(), LetterEncoder()
    feature_map = sbert(encoder, Letters(), cached_texts=6)  # of two sequences
    for b in (0, 1, 0, 2):
        batch.map(lambda x, b=b: x[b : b + 1]).embed(feature_map)
    encoder.asked.clear()
    batch.map(lambda x: x[:1]).embed(feature_map)
    assert len(encoder.asked) == 1  # rollouts only: sequence 1 made room for 2


def test_a_rollout_uses_its_own_sequences_target_vector_and_no_other():
    """With an encoder whose rounding depends on what else is in the call, exaggerated here."""

    class Sloppy(LetterEncoder):
        def encode(self, texts, **options):
            return super().encode(texts, **options) + torch.linspace(0, 0.1 * len(texts), 16)

    batch = make_batch()
    # Sequence 1 samples the first target of sequence 0, which is then embedded among the rollouts as well.
    batch.rollout_tokens[1, 0, 0], batch.rollout_mask[1, 0, 0] = batch.target_tokens[0, 0], batch.target_mask[0, 0]
    rollout, target = batch.embed(sbert(Sloppy(), Letters()))
    assert torch.equal(rollout[0, 0, 1], target[0, 0])
    assert not torch.equal(rollout[1, 0, 0], target[0, 0])


def test_a_rollout_equal_to_its_target_is_equal_to_the_last_bit_also_later():
    feature_map = sbert(LetterEncoder(), Letters(), context_tokens=3)
    for _ in range(2):
        rollout, target = make_batch().embed(feature_map)
        assert torch.equal(rollout[:, :, 1], target)


def test_context_that_pushes_the_continuation_out_is_refused():
    with pytest.raises(UsageError, match=r"context_tokens=26 and a horizon of 5 tokens.*30 word pieces"):
        make_batch().embed(sbert(LetterEncoder(), Letters(), context_tokens=26))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype='float16'.*float32, bfloat16"),
        ({"device": "cpu"}, "device='cpu' applies to a model given by name"),
        ({"context_tokens": -1}, "context_tokens=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"cached_texts": -5}, "cached_texts=-5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UsageError, match=message):
        sbert(LetterEncoder(), Letters(), **options)


class Refusing:
    def decode(self, ids, **options):
        raise OverflowError("can't convert negative int to unsigned")


@pytest.mark.parametrize("tokenizer", [None, object()])
def test_a_tokenizer_that_cannot_decode_is_refused_at_once(tokenizer):
    for make in (lambda: sbert(LetterEncoder(), tokenizer), lambda: from_text_function(len, tokenizer)):
        with pytest.raises(UsageError, match=r"cannot decode.*decode\(ids"):
            make()


def test_ids_that_a_tokenizer_cannot_decode_are_named():
    with pytest.raises(UsageError, match=r"Refusing cannot decode the ids \[\d.*negative int"):
        make_batch().embed(sbert(LetterEncoder(), Refusing()))


def test_a_folder_that_is_no_sentence_transformer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UsageError, match="is no sentence-transformers model"):
        sbert(str(tmp_path), Letters())


# ---- the real encoder


@pytest.fixture(scope="module")
def encoder():
    return sbert("minilm-l6", Letters(), device="cpu").encoder


@pytest.mark.assets
def test_real_features_are_those_of_each_string_alone(encoder):
    batch = make_batch()
    feature_map = sbert(encoder, Letters(), context_tokens=4)
    rollout, target = batch.embed(feature_map)
    rollout_texts, target_texts = texts_of(batch, 4)
    torch.testing.assert_close(rollout.flatten(0, 2), one_by_one(encoder, rollout_texts), rtol=0, atol=1e-5)
    torch.testing.assert_close(target.flatten(0, 1), one_by_one(encoder, target_texts), rtol=0, atol=1e-5)
    assert torch.equal(rollout[:, :, 1], target)


@pytest.mark.assets
def test_real_features_do_not_depend_on_what_is_remembered(encoder):
    fresh, used = (sbert(encoder, Letters()) for _ in range(2))
    make_batch(1).embed(used)
    make_batch().map(lambda x: x[1:2]).embed(used)
    assert all(map(torch.equal, make_batch().embed(used), make_batch().embed(fresh)))


@pytest.mark.assets
def test_real_bfloat16_is_close(encoder):
    exact, _ = make_batch().embed(sbert(encoder, Letters()))
    fast, _ = make_batch().embed(sbert(encoder, Letters(), dtype="bfloat16"))
    assert 0 < (exact @ exact.mT - fast @ fast.mT).abs().max() < 1e-2


@pytest.mark.assets
def test_characters_cut_in_the_middle(encoder):
    """Cut anywhere between the bytes of its characters, a text is finite, and with its context it comes out whole."""
    tokenizer = AutoTokenizer.from_pretrained(assets.resolve("smollm2-135m"))
    ids = torch.tensor(tokenizer.encode("价格😀é𒀀"))
    yes = torch.ones(1, 1, dtype=torch.bool)
    broken = 0
    for anchor in range(1, len(ids)):
        tokens = ids[None]
        rest = ids[None, None, anchor:]
        rollout = rest[:, :, None]
        arguments = (tokens, tokens >= 0, torch.tensor([[anchor]]), yes, rollout, rollout >= 0, rest, rest >= 0)
        assert continuation_texts(tokenizer, *arguments, context_tokens=anchor) == ([["价格😀é𒀀"]], [["价格😀é𒀀"]])
        broken += "\ufffd" in continuation_texts(tokenizer, *arguments)[1][0][0]
        assert sbert(encoder, tokenizer)(*arguments)[0].isfinite().all()
    assert broken > 3


@pytest.mark.parametrize("text", ["\udc80", "a\ud83d", "\x00"])
def test_broken_characters_become_replacement_characters(text):
    class Broken(Letters):
        def decode(self, ids, **options):
            return text

    encoder = LetterEncoder()
    make_batch().embed(sbert(encoder, Broken()))
    (asked,) = {t for call in encoder.asked for t in call}
    assert asked == "".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text)
