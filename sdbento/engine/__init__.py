"""Step-level continuous batching: who advances next, and what that costs. Computes nothing."""
