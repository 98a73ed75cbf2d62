"""Folders of the repository."""

import pathlib

HELPERS = pathlib.Path(__file__).parent
TESTS = HELPERS.parent
ROOT = TESTS.parent
