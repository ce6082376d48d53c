"""Training steps on fake tensors, under a tracker that follows every storage."""
