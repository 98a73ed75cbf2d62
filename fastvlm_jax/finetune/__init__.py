"""Leads from pictures and answers to a tuned model: looks at the data, chooses settings, runs the commands."""
