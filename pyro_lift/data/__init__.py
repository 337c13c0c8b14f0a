"""Tasks: what a task is, and the families of tasks the package can load or make."""
