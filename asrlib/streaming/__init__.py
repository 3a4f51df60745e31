"""Recognition chunk by chunk, with the cache that is really held. Knows nothing of conversion."""
