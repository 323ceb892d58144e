"""Adapters: the tuned tensors in files, with a manifest."""
