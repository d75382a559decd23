"""The OpenAPI document of every route of the server, and a page to read and try them."""
