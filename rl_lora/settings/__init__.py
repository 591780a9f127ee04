"""What is done with configurations: validation, comparison, dotted names and texts of their settings."""
