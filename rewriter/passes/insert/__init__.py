"""Passes that insert: what a plan says, as nodes."""
