"""How much signal a policy gradient carries: measured over independent batches, with intervals.

`plan` says what is measured, `measure` computes gradients, `store` keeps them, `statistics` is the arithmetic on their
inner products, `components` fits where the noise comes from, `show` prints and draws.
"""
