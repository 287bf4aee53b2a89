"""The training loop, its phases, and a run's checkpoints."""
