"""Where the weights of models are: which stay on the device, which wait in host memory."""
