"""Feature maps: what a rollout and its target are compared by.

Every map is a :class:`FeatureMap`, a callable with one signature, so that maps are interchangeable:

=================================  ======================================================================
map                                features of a rollout
=================================  ======================================================================
``ebft.features.hidden.hidden``    hidden states of a frozen causal language model (the paper's map)
``ebft.features.sbert.sbert``      sentence embedding of the decoded text
``ebft.features.ngram.ngram``      hashed counts of token n-grams
``ebft.features.join.join``        several maps side by side
``from_token_function``            any function of tokens and mask
``from_text_function``             any function of a list of strings
=================================  ======================================================================

Pooling over the tokens of a rollout is in ``ebft.features.pooling``, whitening in ``ebft.features.whitening``.
"""

from ebft.features.contract import FeatureMap, HorizonMap, at_horizons, from_token_function
from ebft.features.module import as_module
from ebft.features.text import from_text_function

__all__ = ["FeatureMap", "HorizonMap", "as_module", "at_horizons", "from_text_function", "from_token_function"]
