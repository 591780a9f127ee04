"""Fast products and attention on CPUs: C++ code, its compilation, and the proof that it is right."""
