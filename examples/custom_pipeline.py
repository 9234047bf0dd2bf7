"""A pipeline of one's own: a new sampler, a new feature map and a new reward, each a plain function.

python examples/custom_pipeline.py [MODEL] [STEPS]
"""

import sys

import torch

from ebft.data import load_documents, pack, split_documents
from ebft.features import as_module, from_token_function
from ebft.loops.train import train
from ebft.objectives import EBFTLoss
from ebft.objectives.component import objective
from ebft.policy import CausalPolicy
from ebft.samplers import sampler
from ebft.samplers.anchors import strided


def wandering(mask, *, seed, sequence_ids, document_ids):
    """A sampler: like `strided`, but every row starts its anchors at another place, drawn anew at every step."""
    first = 4 + int(seed[0]) % 8
    return strided(mask, stride=8, first=first, horizon=8, document_ids=document_ids)


def letters(tokens, mask, *, alphabet=64):
    """A feature map: how often each residue of the token ids occurs. [...,G] -> [...,alphabet], unit norm."""
    counts = torch.nn.functional.one_hot(tokens % alphabet, alphabet).float() * mask[..., None]
    return torch.nn.functional.normalize(counts.sum(-2), dim=-1)


def squared_overlap(rollout, target, *, mask):
    """A reward: the kernel (φ·φ')², with the target [B,K,N] and among the rollouts [B,K,N,N]."""
    return (rollout @ target[..., None]).squeeze(-1) ** 2, (rollout @ rollout.mT) ** 2


def main(model: str = "smollm2-135m", steps: int = 3, data: str = "stdlib") -> list[dict[str, float]]:
    policy = CausalPolicy.from_pretrained(model, lora=8)
    documents, _ = split_documents(load_documents(data))
    rows = pack(documents[:20], policy.tokenizer, length=64)
    pipeline = {
        "sample": sampler(wandering, policy.sample, horizon=8, rollouts=4),
        "embed": as_module(from_token_function(letters), documents=True),
        "reward": objective(squared_overlap, estimator="rloo"),
    }
    optimizer = torch.optim.AdamW(policy.trainable().values(), lr=1e-4)
    loss = EBFTLoss(cross_entropy_coefficient=0.1)
    records = []
    for record in train(policy, pipeline, loss, rows, optimizer=optimizer, steps=steps, batch_size=2, seed=0):
        print({name: round(value, 4) for name, value in record.items() if not name.startswith("time_")})
        records.append(record)
    return records


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
