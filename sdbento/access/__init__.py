"""Who asks: callers, their keys, and what a key allows."""
