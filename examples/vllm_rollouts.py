"""Training with rollouts that a vLLM server draws; it gets the new weights after every step.

cp -r MODEL served; VLLM_SERVER_DEV_MODE=1 vllm serve served
python examples/vllm_rollouts.py served [URL] [STEPS]

`served` is replaced after every step: give it a copy.
"""

import sys
from functools import partial
from pathlib import Path

import torch

from ebft.data import load_documents, pack, split_documents
from ebft.features import as_module
from ebft.features.ngram import ngram
from ebft.loops.train import train
from ebft.objectives import EBFTLoss, kernel_values
from ebft.objectives.component import objective
from ebft.policy import CausalPolicy
from ebft.samplers import sampler, vllm
from ebft.samplers.anchors import strided


def main(
    served: str, url: str = "http://localhost:8000", steps: int = 3, data: str = "stdlib"
) -> list[dict[str, float]]:
    policy, server = CausalPolicy.from_pretrained(served), vllm.Server(url, served)
    documents, _ = split_documents(load_documents(data))
    rows = pack(documents[:20], policy.tokenizer, length=64)
    place = partial(strided, stride=16, first=16, horizon=8)
    pipeline = {
        "sample": sampler(place, partial(vllm.sample, server, policy), horizon=8, rollouts=4),
        "embed": as_module(ngram(2), documents=True),
        "reward": objective(kernel_values, estimator="rloo"),
    }
    optimizer, records = torch.optim.AdamW(policy.trainable().values(), lr=1e-5), []
    for record in train(policy, pipeline, EBFTLoss(), rows, optimizer=optimizer, steps=steps, batch_size=2, seed=0):
        vllm.put_weights(server, policy, Path(served))
        print({name: round(value, 4) for name, value in record.items() if not name.startswith("time_")})
        records.append(record)
    return records


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:4]))
