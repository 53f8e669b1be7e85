"""Configs of the anomaly detector."""
