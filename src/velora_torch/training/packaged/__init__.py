"""Models, images and texts that Python packages ship: read from their files, never imported."""
