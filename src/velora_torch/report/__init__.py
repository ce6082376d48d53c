"""What a training run leaves to read: `results.json`, the comparison tables and `report.html`."""
