"""Maps that say where a model looked, and how good they are."""
