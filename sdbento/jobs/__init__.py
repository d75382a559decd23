"""Durable jobs: kept in a database, run through the App, told to webhooks."""
