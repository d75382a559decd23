"""LoRAs: their files, their matrices, and rows of one batch that use different ones."""
