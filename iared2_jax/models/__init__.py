"""Vision transformers as pure Flax linen modules, and the table of named variants."""
