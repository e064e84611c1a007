"""The truth of each op in plain Python and torch, written for reading and for tests, not for speed."""
