"""Pictures, tables and the report of a run."""
