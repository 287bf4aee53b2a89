"""An experiment: its model, data and phases from a config, its directory, and what it does."""
