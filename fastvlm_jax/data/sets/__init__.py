"""Built-in data sets: `fastvlm data NAME` writes one."""
