"""The UNet call of a step, and how it can be made cheaper."""
