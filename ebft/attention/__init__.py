"""Attention over a comb, as one function registered with transformers.

A forward pass is told what it is part of by a keyword argument, ``comb``, which transformers hands through every
decoder layer to the registered function. No 4-D mask, no cache class, no patching of models. There are three kinds:

* `Score`: one differentiable pass over whole rows ``[trunk | teeth]``, by a kernel of `KERNELS`,
* `Prefill`: one pass over the trunk that keeps keys and values,
* `Decode`: one token for every live tooth, against the kept keys and values.
"""

from ebft.attention.decode import Decode, Prefill
from ebft.attention.registered import NAME, Comb
from ebft.attention.rule import ScoreRule
from ebft.attention.score import KERNELS, Score, default_kernel

__all__ = ["KERNELS", "NAME", "Comb", "Decode", "Prefill", "Score", "ScoreRule", "default_kernel"]
