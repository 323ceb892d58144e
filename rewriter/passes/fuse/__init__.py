"""Passes that fuse: the same numbers from fewer or cheaper ops."""
