"""OpenAI's images API: its clients change a base URL and nothing else."""
