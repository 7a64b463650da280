"""Families of models: one file each, named after its `model_type`."""
