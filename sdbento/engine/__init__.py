"""Step-level continuous batching: what runs next, and running it."""
