"""Serving of bundles: scheduler, OpenAI's API over HTTP, Ray Serve, Triton. Only the HTTP server needs starlette."""
