"""wandb, a mirror of the records."""
