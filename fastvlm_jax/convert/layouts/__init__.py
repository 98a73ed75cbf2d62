"""Published model directories: one file per layout that is read or written, and the config formats they share."""
