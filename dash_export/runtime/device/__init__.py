"""Engines on a device with streams: the same steps as `runtime.dispatch`, enqueued instead of run."""
