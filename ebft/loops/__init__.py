"""Training, evaluation and what they leave behind: checkpoints, curves, samples and reports."""
