"""Configs of the distiller."""
