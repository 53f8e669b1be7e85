"""What both systems stand on: transformer, training loop, checkpoints, metrics, reports. Knows neither system."""
