"""MT-Bench: answers of a model, their grading by a judge model through FastChat's functions, and the scores."""
