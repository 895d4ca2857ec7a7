"""The bundled clip: decoded, prepared, asked about."""

from bench.clip import entries

ENTRIES = list(entries())


def test_clip(entry, impl, record):
    record(entry, impl)
