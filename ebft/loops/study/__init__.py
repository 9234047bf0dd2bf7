"""The paper's comparison of methods: its arms, the choice of their learning rates, its tables and plots.

`arms` says what is compared, `choice` chooses learning rates, `measured` reads what the runs left, `differences` is the
arithmetic of pairs, `tables` and `plots` show it. What the runs are is in `ebft/assemble/study*.py`.
"""
