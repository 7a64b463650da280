"""Files on disk, which may be damaged, hostile or written by two at once. Nothing here knows a model."""
