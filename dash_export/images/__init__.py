"""Pictures in: from a file, bytes, an array or a data URL to what a model's first layer takes. Needs Pillow."""
