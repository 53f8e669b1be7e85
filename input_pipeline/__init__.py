"""Files and arrays in, batches out. Knows no model."""
