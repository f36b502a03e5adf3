"""What operators see: logs, metrics, and the warm-up before the first request."""
