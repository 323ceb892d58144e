"""Traced graphs: the module that holds them, and what is found in them."""
