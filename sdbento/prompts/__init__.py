"""Prompts: the weighting syntax, textual inversions, embeddings."""
