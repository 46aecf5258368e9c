"""Training: losses, teachers, the training loop, and checkpoints of a run."""
