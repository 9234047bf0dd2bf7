"""Anchor placement and sampling engines.

`anchors` says where rollouts start (strided, random, single); an engine draws them: `CausalPolicy.sample` shares each
prefix among all its rollouts, `independent.sample` is its slow oracle. `sampler` puts the two together.
"""

from ebft.samplers.component import sampler

__all__ = ["sampler"]
