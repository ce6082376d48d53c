"""What fits the library into others: each file needs one optional package."""
