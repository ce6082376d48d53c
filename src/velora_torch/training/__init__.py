"""What `velora train` runs: the recipe, its data, and the training itself."""
