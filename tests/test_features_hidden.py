"""Hidden-state features against full forwards of the model on each rollout alone."""

import pytest
import torch
from torch.nn.functional import normalize

from ebft.errors import UsageError
from ebft.features import pooling
from ebft.features.hidden import hidden, layer_numbers
from ebft.policy import CausalPolicy
from tests.models import tiny
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
        states = [state[0, len(prefix) :] for state in states]
        if normalization == "layer":
            states = [normalize(state, dim=-1) for state in states]
        joined = torch.cat(states, -1)
        if normalization == "joint":
            joined = normalize(joined, dim=-1)
        return joined[-1] if how == "last" else pooling.pool(joined, torch.ones(len(own), dtype=torch.bool), how=how)

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
@pytest.mark.parametrize("how", ["last", "mean", "concat_quantiles"])
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


def test_documents_are_kept_apart():
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
    rollout, target = batch.embed(hidden(policy, layers=(1, 3)), document_ids=documents)
    with policy.plain() as model:
        rollouts, targets = oracle(model, batch, (1, 3), "layer", "last", documents)
    assert compare(rollout, rollouts) + compare(target, targets) == 25
    assert (rollout - batch.embed(hidden(policy, layers=(1, 3)))[0]).abs().max() > 1e-2


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
