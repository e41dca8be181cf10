"""MoPs in PyTorch: a mixture of soft prompts with a gate, on a frozen language model (arXiv 2310.02842)."""
