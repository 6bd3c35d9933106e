"""The training loop on the DeepSpeed engine, and what surrounds it: checkpoints, evaluation, logs, export."""
