"""BentoML's own endpoints, and what of BentoML is replaced."""
