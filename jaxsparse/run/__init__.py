"""What a run leaves and says: command line, workdir, checkpoints, metrics."""
