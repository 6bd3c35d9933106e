"""Fine-tuning through transformers' Trainer: the run, the Trainer's hooks, the callback for router metrics."""
