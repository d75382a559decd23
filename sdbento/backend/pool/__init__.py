"""Several devices, each with an engine process of its own, behind one App."""
