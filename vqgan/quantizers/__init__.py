"""One small file per bottleneck."""
