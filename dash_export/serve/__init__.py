"""From a bundle to an endpoint. Imports starlette only where the server itself begins (app.py)."""
