"""Pages with pictures about runs, and the page of config keys."""
