"""The API of AUTOMATIC1111's web UI: its clients change an address and nothing else."""
