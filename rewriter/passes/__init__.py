"""Passes: named functions from graph to graph, one a file, in the one list of `pipelines`."""
