"""Serving of bundles: scheduler, OpenAI's API over HTTP, Ray Serve, Triton. Scheduler and Triton need no starlette."""
