"""Pure Flax linen models: backbones, interpreters, and the two together."""
