"""ebft: composable parts for energy-based fine-tuning of language models (arXiv 2603.12248)."""

__version__ = "0.1.0"
