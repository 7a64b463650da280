"""Engines on a device with streams: the same steps as `runtime.decode`, enqueued instead of run."""
