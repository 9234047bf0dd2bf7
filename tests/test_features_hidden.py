"""Hidden-state features against full forwards of the model on each rollout alone."""

import copy

import pytest
import torch
from torch.nn.functional import normalize

from ebft.errors import UsageError
from ebft.features import pooling
from ebft.features.hidden import hidden, layer_numbers
from ebft.objectives.moments import feature_matching_reward
from ebft.policy import CausalPolicy
from ebft.samplers.anchors import targets
from tests.models import NAMES, UNSHARED, tiny
from tests.test_features_contract import ToyBackbone, make_batch


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((0.25, 0.5, 0.75), 28, (7, 14, 21)),
        ((0.25, 0.5, 0.75), 30, (7, 15, 22)),
        ((0.25, 0.5, 0.75), 2, (1, 1, 1)),
        ((0, 1, 8), 8, (0, 1, 8)),
        ((1, 1.0), 8, (1, 8)),
        ("last", 8, (8,)),
        ("mean", 3, (1, 2, 3)),
    ],
)
def test_layer_numbers(layers, depth, expected):
    assert layer_numbers(layers, depth) == expected


@pytest.mark.parametrize("layers", [(9,), (-1,), (1.5,), (0.0,), (float("nan"),), (True,), ("2",), (), "first"])
def test_layers_out_of_range(layers):
    with pytest.raises(UsageError, match="layer"):
        hidden(ToyBackbone(), layers=layers)


def test_unknown_names_are_refused_at_construction():
    with pytest.raises(UsageError, match=r"pooling='max'.*last, mean"):
        hidden(ToyBackbone(), pooling="max")
    with pytest.raises(UsageError, match=r"normalization='l2'.*layer, joint, none"):
        hidden(ToyBackbone(), normalization="l2")


def test_each_layer_is_asked_for_once():
    backbone = ToyBackbone()
    make_batch().embed(hidden(backbone, layers=(5, 2, 5)))
    assert backbone.asked == [2, 5]


def test_norms():
    """Per layer: squared norm = number of layers; joint: 1; none: as it comes."""
    batch = make_batch()
    real = batch.anchor_mask
    for normalization, squared in (("layer", 3.0), ("joint", 1.0)):
        _, target = batch.embed(hidden(ToyBackbone(), normalization=normalization))
        torch.testing.assert_close(target[real].square().sum(-1), torch.full((8,), squared))
    _, plain = batch.embed(hidden(ToyBackbone(), layers=(0, 2), normalization="none"))
    torch.testing.assert_close(plain[..., 30:][real] - 0.2, 3 * plain[..., :30][real])


# ---- against the model


def oracle(model, batch, layers, normalization, how, documents=None):
    """One forward of prefix and continuation for each rollout and each target; features as the paper writes them."""
    captured = {}
    backbone = model.model
    handles = [
        layer.register_forward_hook(lambda module, args, out, i=i: captured.__setitem__(i, out))
        for i, layer in enumerate(backbone.layers, start=1)
    ]
    handles.append(backbone.embed_tokens.register_forward_hook(lambda m, a, out: captured.__setitem__(0, out)))

    def features(prefix, tokens, mask):
        own = tokens[mask]
        if len(own) == 0:
            return None
        ids = torch.cat([prefix, own])[None]
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        states = [captured[i] if torch.is_tensor(captured[i]) else captured[i][0] for i in layers]
        states = [state[0, len(prefix) if how != "mean_with_context" else 0 :] for state in states]
        if normalization == "layer":
            states = [normalize(state, dim=-1) for state in states]
        joined = torch.cat(states, -1)
        if normalization == "joint":
            joined = normalize(joined, dim=-1)
        if how in ("last", "mean_with_context"):
            return joined[-1] if how == "last" else joined.mean(0)
        return pooling.pool(joined, torch.ones(len(own), dtype=torch.bool), how=how)

    rollouts, targets = {}, {}
    with torch.no_grad():
        for b, k in batch.anchor_mask.nonzero().tolist():
            prefix = batch.tokens[b, : batch.anchors[b, k]]
            if documents is not None:
                own_document = documents[b, : len(prefix)] == documents[b, len(prefix) - 1]
                prefix = prefix[own_document]
            targets[b, k] = features(prefix, batch.target_tokens[b, k], batch.target_mask[b, k])
            for n in range(4):
                rollouts[b, k, n] = features(prefix, batch.rollout_tokens[b, k, n], batch.rollout_mask[b, k, n])
    for handle in handles:
        handle.remove()
    return rollouts, targets


def compare(got, want):
    compared = 0
    for place, features in want.items():
        if features is not None:
            # a sum of products rounds in proportion to its largest terms, not to a small result
            atol = 1e-5 * max(1.0, float(features.abs().max()))
            torch.testing.assert_close(got[place], features, rtol=1e-5, atol=atol)
            compared += 1
    return compared


@pytest.mark.parametrize("normalization", ["layer", "joint", "none"])
@pytest.mark.parametrize("how", ["last", "mean", "concat_quantiles", "mean_with_context"])
def test_features_are_those_of_independent_forwards(normalization, how):
    batch = make_batch()
    policy = CausalPolicy(tiny(num_hidden_layers=4))
    rollout, target = batch.embed(hidden(policy, normalization=normalization, pooling=how))
    with policy.plain() as model:
        rollouts, targets = oracle(model, batch, (1, 2, 3), normalization, how)
    assert compare(rollout, rollouts) == 32
    assert compare(target, targets) == 8


def test_embeddings_and_the_last_layer_without_the_final_norm():
    batch = make_batch()
    policy = CausalPolicy(tiny())
    rollout, target = batch.embed(hidden(policy, layers=(0, 3), normalization="none"))
    with policy.plain() as model:
        rollouts, targets = oracle(model, batch, (0, 3), "none", "last")
    assert compare(rollout, rollouts) + compare(target, targets) == 40


@pytest.mark.parametrize("how", ["last", "mean_with_context"])
def test_documents_are_kept_apart(how):
    """Anchors whose targets stay inside their document; attention and features end at its border."""
    batch = make_batch()
    documents = (torch.arange(20) >= 9).long().repeat(3, 1)
    batch.anchors[:, 1] = 12
    batch.anchor_mask = torch.tensor([[False, True, True], [True, True, False], [True, False, False]])
    positions = batch.anchors[..., None] + torch.arange(5)
    rows = torch.arange(3)[:, None, None]
    batch.target_tokens = batch.tokens[rows, positions.clamp(max=19)]
    batch.target_mask = batch.mask[rows, positions.clamp(max=19)]
    policy = CausalPolicy(tiny())
    feature_map = hidden(policy, layers=(1, 3), pooling=how)
    rollout, target = batch.embed(feature_map, document_ids=documents)
    with policy.plain() as model:
        rollouts, targets = oracle(model, batch, (1, 3), "layer", how, documents)
    assert compare(rollout, rollouts) + compare(target, targets) == 25
    assert (rollout - batch.embed(feature_map)[0]).abs().max() > 1e-2


def test_mean_over_layers():
    batch = make_batch()
    policy = CausalPolicy(tiny())
    parts = [batch.embed(hidden(policy, layers=(i,), pooling="none"))[0] for i in (1, 2, 3)]
    rollout, _ = batch.embed(hidden(policy, layers="mean", pooling="none"))
    assert rollout.shape == (3, 3, 4, 5, 32)
    torch.testing.assert_close(rollout, torch.stack(parts).mean(0))
    joint, _ = batch.embed(hidden(policy, layers="mean", normalization="joint"))
    torch.testing.assert_close(joint[batch.anchor_mask].norm(dim=-1), torch.ones(8, 4))


def test_last_pooling_is_pooling_of_all_tokens():
    batch = make_batch()
    policy = CausalPolicy(tiny())
    per_token, _ = batch.embed(hidden(policy, layers=(1, 2), normalization="joint", pooling="none"))
    pooled = pooling.last(per_token, batch.own_rollouts)
    torch.testing.assert_close(batch.embed(hidden(policy, layers=(1, 2), normalization="joint"))[0], pooled)


def test_the_policy_can_move_while_its_reference_stays():
    batch = make_batch()
    policy = CausalPolicy(tiny())
    feature_map = hidden(policy.reference())
    before = batch.embed(feature_map)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.1)
    assert all(map(torch.equal, before, batch.embed(feature_map)))
    assert not torch.equal(before[0], batch.embed(hidden(policy))[0])


@pytest.mark.parametrize("name", [*NAMES, *UNSHARED])
def test_every_architecture_gives_the_states_that_the_model_itself_reports(name):
    """Also of those that cannot share a prefix; a layer's states do not change by stopping there."""
    batch = make_batch()
    model = tiny(name)
    policy = CausalPolicy(copy.deepcopy(model))
    rollout, target = batch.embed(hidden(policy, layers=(0, 1), normalization="none"))
    with torch.no_grad():
        for b, k in batch.anchor_mask.nonzero().tolist():
            prefix = batch.tokens[b, : batch.anchors[b, k]]
            lines = [*zip(batch.rollout_tokens[b, k], batch.rollout_mask[b, k], rollout[b, k], strict=True)]
            for ids, keep, found in [*lines, (batch.target_tokens[b, k], batch.target_mask[b, k], target[b, k])]:
                row = torch.cat([prefix, ids[keep]])[None]
                states = model(input_ids=row, attention_mask=torch.ones_like(row), output_hidden_states=True)
                reported = states.hidden_states
                if name == "mamba":  # it reports what leaves its blocks, without the embeddings
                    reported = (model.get_input_embeddings()(row), *reported)
                want = torch.cat([reported[layer][0, -1] for layer in (0, 1)])
                # states of tens round in proportion to their size
                torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5 * max(1.0, float(want.abs().max())))
    deeper, _ = batch.embed(hidden(policy, layers=(0, 1, policy.num_layers), normalization="none"))
    assert torch.equal(deeper[..., : rollout.shape[-1]], rollout)


@pytest.mark.parametrize("how", pooling.NAMES)
def test_a_rollout_equal_to_its_target_has_its_features_to_the_last_bit(how):
    batch = make_batch()
    rollout, target = batch.embed(hidden(CausalPolicy(tiny(), kernel="chunked"), pooling=how))
    assert torch.equal(rollout[:, :, 1], target)
    if how == "none":  # up to the first token that differs
        batch.rollout_tokens[0, 0, 1, 3] += 1
        changed, _ = batch.embed(hidden(CausalPolicy(tiny(), kernel="chunked"), pooling=how))
        assert torch.equal(changed[0, 0, 1, :3], target[0, 0, :3])
        assert not torch.equal(changed[0, 0, 1, 3], target[0, 0, 3])


def test_last_is_the_last_answer_token_where_an_answer_ends():
    batch = make_batch()
    answers = batch.mask.clone()
    answers[:, 10:] = False
    place = {"horizon": 5, "answer_mask": answers}
    batch.target_tokens, batch.target_mask = targets(
        batch.tokens, batch.mask, batch.anchors, batch.anchor_mask, **place
    )
    assert batch.target_mask[0, 1].tolist() == [True, True, False, False, False]
    _, target = batch.embed(hidden(ToyBackbone(), layers=(0,), normalization="none"))
    assert target[0, 1, -1] == 9  # the position of the last token before 10


def test_an_end_is_one_of_the_rollouts_own_tokens():
    batch = make_batch()
    batch.rollout_tokens[0, 0, 0, 2], batch.rollout_mask[0, 0, 0] = 1, torch.arange(5) < 3
    rollout, _ = batch.embed(hidden(ToyBackbone(), layers=(0,), normalization="none"))
    assert rollout[0, 0, 0, 1] == 1  # one-hot of EOS
    assert rollout[0, 0, 0, -1] == batch.anchors[0, 0] + 2


@pytest.mark.parametrize("normalization", ["layer", "joint"])
def test_a_group_of_rollouts_equal_to_the_target_has_no_reward(normalization):
    batch = make_batch()
    batch.rollout_tokens = batch.target_tokens[:, :, None].repeat(1, 1, 4, 1)
    batch.rollout_mask = batch.target_mask[:, :, None].repeat(1, 1, 4, 1)
    rollout, target = batch.embed(hidden(CausalPolicy(tiny()), normalization=normalization))
    reward = feature_matching_reward(rollout, target, diversity=1.0)
    torch.testing.assert_close(reward, torch.zeros_like(reward), rtol=0, atol=3e-6)
    assert rollout[batch.anchor_mask].norm(dim=-1).min() > 0.9
