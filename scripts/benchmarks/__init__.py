"""All that measures: speed, memory, and comparisons with other projects."""
