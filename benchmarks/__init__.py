"""distclip against its peers: `python -m benchmarks`, from the project's root. Nothing in src/
imports it."""
