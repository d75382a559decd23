"""A request from its schema to the trajectories of its images, and back to its answer."""
