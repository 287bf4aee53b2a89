"""What is kept on disk: a run's own state (Orbax), and weights to share (safetensors)."""
