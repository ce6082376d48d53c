"""What compression does to a model's activations and gradients: `velora analyze`."""
