"""Models in memory: loaded, compiled, leased to requests, evicted."""
