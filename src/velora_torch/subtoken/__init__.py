"""The method: sub-tokens, their projections, and the gradient as a factor."""
