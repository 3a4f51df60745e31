"""Word errors and their differences, time, memory and cache. Knows nothing of training."""
