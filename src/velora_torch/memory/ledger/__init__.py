"""What a forward pass saves for the backward pass, and for whom."""
