"""Runnable documents: each config states its command, cost and measured result."""
