"""LoRAs: files, matrices, and rows with different ones in one forward."""
