"""Operations: logs, metrics, and the warm-up before the first request."""
