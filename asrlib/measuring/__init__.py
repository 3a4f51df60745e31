"""Word errors and whether they differ, time, memory, cache. Knows nothing of training."""
