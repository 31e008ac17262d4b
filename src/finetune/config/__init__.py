"""One schema for the whole configuration, as pydantic models; :func:`finetune.config.check.check` applies it."""
