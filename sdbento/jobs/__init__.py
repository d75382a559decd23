"""Durable jobs: kept in a database, run through the App, posted to webhooks."""
