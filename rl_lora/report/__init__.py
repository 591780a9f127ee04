"""What people look at: the terminal, the files of a run, plots and pages."""
