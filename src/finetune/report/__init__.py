"""From records to the paper's tables: statistics, layouts, verdicts, writers."""
