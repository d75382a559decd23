"""What is bounded before a route is asked: connections, heads, bodies, and their time."""
