"""What makes images: the models, the engine and the device that it computes on."""
