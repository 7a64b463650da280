"""Lowerings: portable graphs rewritten for what a backend runs best."""
