"""The page at /: a form, the pictures made with it, and how they come to be. No build step."""
