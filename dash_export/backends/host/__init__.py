"""Common part of backends without streams: the host's loop over a token's engines, and the KV cache in host memory."""
