"""The worker: one loop per file, each readable alone. `worker.py` owns them."""
