"""Recognition chunk by chunk, with a real cache. Knows nothing of conversion."""
