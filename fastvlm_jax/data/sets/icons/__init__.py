"""Draws pictures of things with their names, in several styles each, from the icons in npm packages."""
