"""Runs TorchServe and packs what it serves: used by the commands in scripts/, the tests and the benchmarks."""
