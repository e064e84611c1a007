"""Stand-in; see the README beside it."""
