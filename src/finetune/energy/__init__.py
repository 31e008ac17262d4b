"""Where the energy of weight gradients lies, in which basis, and how that changes while a model is fine-tuned."""
