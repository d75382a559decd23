"""What /metrics shows in addition to BentoML's own metrics: counted where it happens."""
