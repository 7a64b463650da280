"""Portable graphs, built by hand, with the checkpoint's own bytes."""
