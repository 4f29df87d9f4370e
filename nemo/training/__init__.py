"""Training: one loop, its tasks, its checkpoints, and the cells of the experiment."""
