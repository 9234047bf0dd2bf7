"""Evaluation: what a policy does on held-out data, with intervals, and how policies differ on the same data."""
