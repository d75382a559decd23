"""Requests: their fields, what is decided and checked, the trajectories made of them, results."""
