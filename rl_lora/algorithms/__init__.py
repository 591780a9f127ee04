"""Objectives and advantages, by name: the arithmetic of a policy gradient, and what each asks of a run.

A room below the configuration, which reads the names, the defaults and the options. Its functions know arrays and
nothing of models, and no library is imported for them: `--help` lists them within a second.
"""
