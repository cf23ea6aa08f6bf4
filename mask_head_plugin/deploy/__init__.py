"""Trained models outside of Python's laboratory: export, and a runtime without PyTorch.

Import from the modules: the runtime must not load what the exporter needs.
"""
