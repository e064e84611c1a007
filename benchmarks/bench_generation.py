"""``generation`` in full. Options are those of ``unmask bench``: --device cuda, --threads N, --seconds S."""

from common import run

raise SystemExit(run("generation"))
