"""`velora bench`: a published protocol as a grid of runs, with a table and a plot."""
