"""Backends: one folder each, with how it builds engines and how it runs them. `base.py` has the registry."""
