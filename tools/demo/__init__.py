"""The scripts that made the bundled demo models; run them as `python -m tools.demo.NAME`."""
