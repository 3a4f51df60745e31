"""A run's model in forms that work without asrlib: a folder for the hub, standard attention, or ONNX graphs."""
