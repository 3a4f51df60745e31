"""Fine-tuning and training, in one process or several."""
