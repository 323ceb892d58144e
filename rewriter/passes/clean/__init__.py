"""Passes that clean a graph: what the trace or an exporter left in it."""
