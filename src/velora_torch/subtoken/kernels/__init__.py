"""Loops that PyTorch's operators need several passes over memory for, each written once in C."""
