"""What all HTTP routes have in common, and those routes that imitate nobody's API."""
