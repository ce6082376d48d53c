"""Pre-training: validation perplexity, memory and speed, next to the low-rank optimizers."""
