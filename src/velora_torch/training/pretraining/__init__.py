"""Pre-training: raw text into tokens on the disk, and models that start from random weights."""
