"""The jobs in their database: queue, results and what is to be told of them."""
