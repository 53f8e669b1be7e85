"""Fields in which a detector's config may differ from its work directory's, whatever is done: none changes training."""

from core.workdir import LOGGING, READING

DETECTOR = (*READING, *LOGGING, "data.cache", "data.kind", "mesh.", "slices.")
