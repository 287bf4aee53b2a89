"""Vision transformers in Flax linen, one file a family."""
