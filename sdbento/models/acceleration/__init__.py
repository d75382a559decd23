"""How a model computes faster: attention, fp8, compiled blocks, channels-last order."""
