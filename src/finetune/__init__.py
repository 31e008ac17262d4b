"""The comparison: four fine-tuning methods behind one interface, one training loop, records, and the paper's tables."""
