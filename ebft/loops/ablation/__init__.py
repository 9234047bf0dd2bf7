"""Ablations: runs of a grid, each in a folder of its own, and what they or a replay of saved rollouts say side by side.

`study` runs, `results` holds and writes what came out, `tables` and `plots` show it, `intervals` is the arithmetic;
`rollouts` saves rollouts, `sketch` their score gradients, `replay` measures what cells make of them.
"""
