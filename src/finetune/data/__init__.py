"""Tasks and text: GLUE in the hub's layout, and generated tasks in the same format."""
