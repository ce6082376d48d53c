"""The fastest way to train that fits into a budget."""
