"""A run's model as something that works without asrlib: a folder for the hub, standard attention, or ONNX graphs."""
