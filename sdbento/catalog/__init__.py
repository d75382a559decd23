"""What can be asked for by name, and what its files are, read without loading a weight."""
