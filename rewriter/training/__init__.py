"""Training: schedules over the steps, the loop, checkpoints."""
