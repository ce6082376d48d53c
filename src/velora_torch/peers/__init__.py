"""Methods of others that no maintained package has, written small, to be compared with."""
