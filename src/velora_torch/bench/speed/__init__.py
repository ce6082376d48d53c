"""How long a training step takes: layers, models, and the parts of a compressed layer."""
