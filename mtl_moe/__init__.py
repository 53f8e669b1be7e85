"""Anomaly detection in medical images: several proxy tasks learned from scratch by one Mixture-of-Experts model."""
